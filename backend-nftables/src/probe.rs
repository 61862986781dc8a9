//! Finds out whether the nftables mode works here, and says why not. Changes nothing.

use std::{fs, net::IpAddr, num::NonZeroU16, sync::Arc};

use proxier_core::{
    Family, Protocol,
    ir::{FrontendKey, NodeView, Pool, WayIn},
    spi::Backend,
};
use proxier_netlink::{
    ErrorKind, NetNs,
    nft::{NftError, NftSocket, Transaction},
};

use crate::{
    backend::{Nftables, Op},
    compile::{recall_rule, remember_rule},
    config::Config,
    dataplane::{Batch, Handles, mark},
    field::nft_family,
    object::{
        Chain, ChainName, Content, Element, Endpoint, Key, Object, Pick, PortId, SetName, Size,
        Space, Value,
    },
};

/// Whether the nftables mode works in a network namespace.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Suitability {
    /// It works, in at least one family.
    pub available: bool,
    /// The families it works in.
    pub families: Vec<Family>,
    /// Why it does not work, where it does not.
    pub reasons: Vec<String>,
    /// What works, but may surprise.
    pub warnings: Vec<String>,
}

/// Finds out whether the nftables mode works in a network namespace.
///
/// A table with everything in it is tried in a transaction that is then given up, so nothing is left
/// behind, and what the kernel lacks is named. It may load kernel modules, as the first sync would.
///
/// # Cancel safety
/// Safe to drop and to call again.
pub async fn probe(netns: &NetNs) -> Suitability {
    let mut found = Suitability::default();
    match netns.run(warnings) {
        Ok(warnings) => found.warnings = warnings,
        Err(error) => {
            found.reasons.push(error.to_string());
            return found;
        }
    }
    let mut socket = match NftSocket::open(netns) {
        Ok(socket) => socket,
        Err(error) => {
            found.reasons.push(error.to_string());
            return found;
        }
    };
    for family in Family::ALL {
        match try_family(&mut socket, family).await {
            Ok(()) => found.families.push(family),
            Err(reason) => found.reasons.push(format!("{family}: {reason}")),
        }
    }
    found.reasons.dedup();
    found.available = !found.families.is_empty();
    found
}

/// What files of the calling thread's namespace say.
fn warnings() -> Vec<String> {
    let is_one = |path: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == "1");
    let mut warnings = Vec::new();
    let has_ipv6 = fs::exists("/proc/thread-self/net/if_inet6").unwrap_or(false);
    if !has_ipv6 || is_one("/proc/sys/net/ipv6/conf/all/disable_ipv6") {
        warnings.push("IPv6 is off: its table is written, but sees no packets".to_owned());
    }
    if !is_one("/proc/sys/net/ipv4/conf/all/route_localnet") {
        warnings.push(
            "net.ipv4.conf.all.route_localnet is 0: node ports do not answer on 127.0.0.1"
                .to_owned(),
        );
    }
    warnings
}

/// A table that is nobody's.
const PROBE: &str = "proxier-probe";
const NOTHING: &str = "nothing";

/// Tries everything in one family.
async fn try_family(socket: &mut NftSocket, family: Family) -> Result<(), String> {
    let backend = Nftables::new(Config::default().table(PROBE)).map_err(|it| it.to_string())?;
    let ops = everything(&backend, family);
    let end = u32::try_from(ops.len()).unwrap_or(u32::MAX);
    match socket.commit(&attempt(family, &ops, end)).await {
        Err(NftError::Refused(refusal)) if refusal.tag == Some(end) => Ok(()),
        Err(NftError::Refused(refusal)) if refusal.kind() != ErrorKind::Permission => {
            let at = refusal.tag.and_then(|tag| usize::try_from(tag).ok());
            let object = at.and_then(|at| ops.get(at)).map(|op| op.key().to_string());
            let object = object.unwrap_or_else(|| refusal.object.clone());
            Err(match &refusal.unsupported {
                Some(missing) => format!("the kernel has no {missing} (for {object})"),
                None => format!("the kernel does not take {object} ({})", refusal.ack),
            })
        }
        Err(error) => Err(error.to_string()),
        // The last message names what does not exist.
        Ok(_) => Err("a transaction that must fail did not".to_owned()),
    }
}

/// A transaction that tries operations, and fails at the end in any case.
fn attempt(family: Family, ops: &[Op], end: u32) -> Transaction {
    let (mark, handles) = (mark(), Handles::new());
    let batch = Batch { table: PROBE, mark: &mark, family, handles: &handles, careful: false };
    let mut tx = batch.encode(ops);
    tx.op(end);
    tx.del_chain(nft_family(family), PROBE, NOTHING);
    tx
}

/// The skeleton, and one object of each sort that comes with Services.
fn everything(backend: &Nftables, family: Family) -> Vec<Op> {
    let (ip, net) = match family {
        Family::V4 => (IpAddr::from([192, 0, 2, 1]), "192.0.2.0/24"),
        Family::V6 => (IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]), "2001:db8::/32"),
    };
    let mut objects = backend.skeleton(family, &NodeView::default());
    let mut add = |object, content| objects.insert(Key::new(family, object), Value(content));
    let (pool, space, size, port) = (Pool::Cluster, Space::Service, Size::of(100), 80);
    let id = PortId([1, 2]);
    add(Object::Set(SetName::Affinity(pool)), Content::Exists);
    add(Object::Set(SetName::Size(space, pool, size)), Content::Exists);
    for protocol in [Protocol::Sctp, Protocol::Tcp, Protocol::Udp] {
        for pick in Pick::turns(space, pool, size, protocol) {
            add(Object::Pick(pick), Content::Exists);
        }
        let way_in = WayIn::Address(ip);
        let frontend = FrontendKey { way_in, port: NonZeroU16::MIN, protocol };
        let endpoint = Element::Endpoint { pool, frontend, slot: 0 };
        add(Object::Element(endpoint), Content::Endpoint(Endpoint { ip, port }));
        if let Ok(net) = net.parse() {
            let source = Element::Source(Box::new((frontend, net)));
            add(Object::Element(source), Content::Exists);
        }
        let sticky = Element::Sticky { pool, frontend };
        add(Object::Element(sticky), Content::Leads(ChainName::Sticky(id, pool)));
    }
    let mut chain = |name, rule| {
        let chain = Chain { comment: Some(PROBE.into()), rules: vec![rule] };
        add(Object::Chain(name), Content::Chain(Arc::new(chain)));
    };
    let tcp = Protocol::Tcp;
    chain(ChainName::Sticky(id, pool), recall_rule(family, tcp, pool, id, port));
    chain(ChainName::Remember(id), remember_rule(family, tcp, pool, id, port, 1));
    objects.into_iter().map(|(key, value)| Op::Add(key, value)).collect()
}
