//! Random changes of many Services: whether the kernel holds what is believed, and memory stays flat.
//!
//! `cargo run --release -p proxier-backend-nftables --example soak -- [SERVICES [CHANGES [SEED]]]`
#![allow(
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "a long test, run by hand"
)]

mod world;

use std::{collections::BTreeSet, error::Error, time::Instant};

use proxier_backend_nftables::{Config, Nftables, NftablesDataplane, engine};
use proxier_core::{
    Family, ObjectName, Proxier,
    engine::Engine,
    model::{
        DetectLocal, EndpointSlice, Event, NodeEnv, Object, ObjectKey, Service, Store,
        api::{self, Metadata},
    },
    spi::Dataplane,
};
use proxier_netlink::NetNs;
use world::memory_kib;

/// How often everything is compared.
const CHECKS: u32 = 10;
/// Services below this may have a node port.
const NODE_PORTS: u32 = 2_000;

/// Numbers that look random, the same in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u32) -> u32 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        u32::try_from(high % u64::from(limit)).unwrap()
    }
}

/// A Service as it is at present.
#[derive(Clone, Debug, Default)]
struct State {
    exists: bool,
    /// What it asks for: a number with a bit for each setting.
    settings: u32,
    endpoints: BTreeSet<u32>,
}

impl State {
    fn has(&self, bit: u32) -> bool {
        self.settings & 1 << bit != 0
    }

    fn change(&mut self, dice: &mut Dice) {
        match dice.below(100) {
            0..5 => self.exists = !self.exists,
            // Most ask for nothing special: a table for hashing has 251 places.
            5..12 => {
                self.settings = dice.below(256) & dice.below(256);
                if dice.below(16) > 0 {
                    self.settings &= !0b1100;
                }
            }
            12..16 => self.endpoints.clear(),
            _ => {
                let endpoint = dice.below(12);
                if !self.endpoints.remove(&endpoint) {
                    self.endpoints.insert(endpoint);
                }
            }
        }
    }

    fn service(&self, index: u32) -> Event {
        let name = format!("service-{index}");
        if !self.exists {
            return Event::Delete(ObjectKey::Service(ObjectName::new("shop", &name)));
        }
        let [_, _, high, low] = index.to_be_bytes();
        let text = |yes: bool, text: &str| yes.then(|| text.to_owned());
        let node_port = index < NODE_PORTS && self.has(0);
        let mut metadata = Metadata { name, namespace: "shop".to_owned(), ..Metadata::default() };
        for (bit, key, value) in
            [(1, "counters", "true"), (2, "balance", "round-robin"), (3, "balance", "source-hash")]
        {
            if self.has(bit) {
                metadata.annotations.insert(format!("proxier.dev/{key}"), value.to_owned());
            }
        }
        let mut object = api::Service { metadata, ..api::Service::default() };
        object.spec.service_type = text(node_port, "NodePort");
        object.spec.cluster_ip = format!("10.97.{high}.{low}");
        object.spec.session_affinity = text(self.has(4) && self.has(5), "ClientIP");
        object.spec.external_traffic_policy = text(self.has(6), "Local");
        if self.has(7) {
            object.spec.external_ips = vec![format!("198.18.{high}.{low}")];
        }
        let node_port = if node_port { 30_000 + i64::from(index) } else { 0 };
        let port = api::ServicePort { port: 80, node_port, ..api::ServicePort::default() };
        object.spec.ports = vec![port];
        Event::Apply(Object::Service(Service::read(&object).value.unwrap()))
    }

    fn slice(&self, index: u32) -> Event {
        let mut metadata = Metadata {
            name: format!("service-{index}-1"),
            namespace: "shop".to_owned(),
            ..Metadata::default()
        };
        let label = "kubernetes.io/service-name".to_owned();
        metadata.labels.insert(label, format!("service-{index}"));
        let endpoint = |number: &u32| {
            let [_, a, b, c] = (index * 16 + number).to_be_bytes();
            api::Endpoint {
                addresses: vec![format!("10.{}.{b}.{c}", 128 + a)],
                node_name: Some(if number.is_multiple_of(3) { "tern" } else { "gull" }.to_owned()),
                ..api::Endpoint::default()
            }
        };
        let object = api::EndpointSlice {
            metadata,
            address_type: "IPv4".to_owned(),
            ports: vec![api::EndpointPort {
                name: Some(String::new()),
                port: Some(8080),
                ..api::EndpointPort::default()
            }],
            endpoints: self.endpoints.iter().map(endpoint).collect(),
        };
        Event::Apply(Object::EndpointSlice(EndpointSlice::read(&object).value.unwrap()))
    }
}

/// Panics unless the kernel holds what the engine believes, and an audit finds nothing.
async fn check(engine: &mut Engine<Nftables, NftablesDataplane>) {
    let predicted = engine.predicted(Family::V4);
    let actual = engine.dataplane_mut().dump(Family::V4).await.unwrap();
    assert!(predicted == actual, "kernel and prediction differ");
    drop((predicted, actual));
    assert_eq!(engine.audit().await.unwrap().drift, 0, "somebody changed something");
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<u32>());
    let services = args.next().transpose()?.unwrap_or(10_000).clamp(1, 65_000);
    let changes = args.next().transpose()?.unwrap_or(100_000).max(CHECKS);
    let seed = args.next().transpose()?.unwrap_or(1);
    let mut dice = Dice(u64::from(seed) << 8 | 1);
    // As they would be after many changes, so that the world does not grow with the history.
    let mut state = || {
        let mut state = State { exists: true, ..State::default() };
        (0..64).for_each(|_| state.change(&mut dice));
        state
    };
    let mut states: Vec<_> = (0..services).map(|_| state()).collect();
    let mut store = Store::new(NodeEnv {
        name: "tern".to_owned(),
        detect_local: DetectLocal::ClusterCidr(vec!["10.128.0.0/9".parse()?]),
        ..NodeEnv::default()
    });
    store.apply(Event::Services(Vec::new()));
    store.apply(Event::EndpointSlices(Vec::new()));
    for (index, state) in (0..).zip(&states) {
        store.apply(state.service(index));
        store.apply(state.slice(index));
    }
    let ns = NetNs::create()?;
    let mut engine = engine(Config::default(), &ns, &[Family::V4])?;
    engine.sync(store.take().ok_or("a first update")?).await?;
    check(&mut engine).await;
    println!("{services} services, {changes} changes, seed {seed}");
    println!("start: {} KiB resident", memory_kib("VmRSS"));

    let mut resident = Vec::new();
    let mut slowest = std::time::Duration::ZERO;
    let began = Instant::now();
    for change in 1..=changes {
        let index = dice.below(services);
        let state = &mut states[usize::try_from(index)?];
        state.change(&mut dice);
        store.apply(state.service(index));
        store.apply(state.slice(index));
        if let Some(update) = store.take() {
            let start = Instant::now();
            let report = engine.sync(update).await?;
            slowest = slowest.max(start.elapsed());
            assert_eq!((report.degraded.len(), report.drift), (0, 0), "{report:?}");
        }
        if change % (changes / CHECKS) == 0 {
            check(&mut engine).await;
            resident.push(memory_kib("VmRSS"));
            println!(
                "{change:>8} changes in {:.1} s: {} KiB resident, slowest sync {slowest:?}",
                began.elapsed().as_secs_f64(),
                memory_kib("VmRSS")
            );
        }
    }
    let (first, second) = resident.split_at(resident.len() / 2);
    let mean = |part: &[u64]| part.iter().sum::<u64>() / u64::try_from(part.len()).unwrap();
    let (first, second) = (mean(first), mean(second));
    assert!(second <= first + first / 10, "memory grew from {first} to {second} KiB");
    let totals = engine.status().totals;
    println!(
        "kernel and prediction are equal; {} operations",
        totals.add + totals.set + totals.del
    );
    engine.cleanup().await?;
    Ok(())
}
