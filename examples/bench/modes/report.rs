//! The tables.

use crate::{
    Measured, SMALL,
    grid::Grid,
    peer::Peer,
    schema::Spread,
    units::{ms, us},
    world::World,
};

pub(crate) fn report(
    world: World,
    modes: &[Measured],
    peer: &Peer,
    outside_ms: Option<f64>,
) -> String {
    let mut text =
        [programming(world, modes, peer), packets(modes)].map(|grid| grid.text()).join("\n");
    let median = |values: &[f64]| Spread::of(values).map_or(f64::NAN, |it| it.p50);
    for it in modes {
        let load = median(&it.big.first_sync_ms);
        let ratio = peer.load_ms / load;
        text += &format!("\n{} loads {ratio:.1} times as fast as ipvsadm --restore", it.mode);
        if let Some(outside) = outside_ms.filter(|_| it.mode == proxier::Mode::Nftables) {
            let slow = load / outside;
            text += &format!(
                "\nthe guest is {slow:.1} times slower: the same load took {} outside",
                ms(outside)
            );
        }
    }
    text
}

fn programming(world: World, modes: &[Measured], peer: &Peer) -> Grid {
    let title = format!("{} Services x {} endpoints", world.services, world.endpoints);
    let small = format!("{} Services", SMALL.min(world.services));
    let big = format!("{} Services", world.services);
    let head = ["one endpoint, p50 / p99 / max", "load", &small, &big];
    let mut grid = Grid::new(title, &head);
    for it in modes {
        let load = Spread::of(&it.big.first_sync_ms).map(|it| ms(it.p50)).unwrap_or_default();
        grid.row([it.mode.to_string(), load, all(&it.small.change_us), all(&it.big.change_us)]);
    }
    let name = "ipvsadm --restore".to_owned();
    grid.row([name, ms(peer.load_ms), "-".to_owned(), all(&peer.change_us)]);
    grid
}

fn packets(modes: &[Measured]) -> Grid {
    let head =
        ["connect, p50 / p99", "direct", "first", "last", "last - direct", "conn/s", "direct"];
    let mut grid = Grid::new("", &head);
    for it in modes {
        let path = &it.path;
        let ways = [path.direct_us, path.first_us, path.last_us];
        let ways = ways.map(|way| format!("{} / {}", us(way.p50), us(way.p99)));
        let added = format!("{:+.1} µs", path.last_us.p50 - path.direct_us.p50);
        let rate = path.rate.iter().find(|rate| rate.unit == "connections/s");
        let rates = rate.map_or([f64::NAN; 2], |rate| [rate.service.p50, rate.direct.p50]);
        let rates = rates.map(|rate| format!("{rate:.0}"));
        let name = std::iter::once(it.mode.to_string());
        grid.row(name.chain(ways).chain([added]).chain(rates));
    }
    grid
}

fn all(values: &[f64]) -> String {
    let text = |it: Spread| format!("{} / {} / {}", us(it.p50), us(it.p99), us(it.max));
    Spread::of(values).map(text).unwrap_or_default()
}
