//! The pure half of the mode.

use std::collections::BTreeMap;

use proxier_core::{
    Capabilities, Count, Counter, Family, Mode, Spreading,
    ir::{Balance, Fragment, NodeView},
    spi::{Backend, Objects, PlanError, Stage},
};

use crate::{
    compile::{compile, servers},
    config::{Config, ConfigError},
    object::{Key, SetName, Value},
    skeleton::skeleton,
};

/// An operation of this mode.
pub(crate) type Op = proxier_core::spi::Op<Key, Value>;

/// The pure half of the IPVS mode: which virtual servers, destinations, addresses and set elements a
/// fragment needs.
#[derive(Debug)]
pub struct Ipvs {
    config: Config,
    capabilities: Capabilities,
}

impl Ipvs {
    /// Makes the pure half.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.validate()?;
        let limits = vec![
            "Needs net.ipv4.vs.conntrack=1: without it nothing is masqueraded.",
            "Session affinity holds for each address by itself; through node ports, and where \
             origins have different endpoints, it is a hash of the client's address.",
            "Packets to node ports, and where origins have different endpoints, lose foreign marks.",
            "What a client is remembered by lives as long as its connections, which the kernel keeps \
             for two minutes after their end.",
            "Addresses of Services are the node's: ports that no Service has are refused there.",
            "Node ports do not answer on loopback addresses.",
            "Not atomic: while a change is carried out, some of it is in effect.",
        ];
        let balance = &[Balance::RoundRobin, Balance::SourceHash];
        let spreading = Spreading { balance, weights: true, counters: true };
        let capabilities = Capabilities { mode: Mode::Ipvs, atomic: false, spreading, limits };
        Ok(Self { config, capabilities })
    }

    /// The settings.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }
}

impl Backend for Ipvs {
    type Key = Key;
    type Value = Value;
    type Memo = ();

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn skeleton(&self, family: Family, node: &NodeView) -> BTreeMap<Key, Value> {
        skeleton(&self.config, family, node.of(family))
    }

    fn compile(
        &self,
        node: &NodeView,
        fragment: &Fragment,
        (): &(),
        out: &mut Objects<Key, Value>,
    ) -> Result<(), PlanError> {
        compile(&self.config, node.of(fragment.id.family), fragment, out)
    }

    /// Marks follow from the fragment: nothing has to be remembered.
    fn recall(&self, _: &Fragment, _: &BTreeMap<Key, Value>) {}

    fn counters(
        &self,
        node: &NodeView,
        fragment: &Fragment,
        (): &(),
        read: &BTreeMap<Key, Count>,
    ) -> Vec<Counter> {
        let mut whole = Count::default();
        let mut by_endpoint: BTreeMap<_, Count> = BTreeMap::new();
        for (id, pool) in servers(&self.config, node.of(fragment.id.family), fragment) {
            let of = |key| read.get(&key).copied().unwrap_or_default();
            whole = whole.plus(of(Key::Server(id)));
            for member in fragment.pool(pool) {
                let count = by_endpoint.entry(member.addr).or_default();
                *count = count.plus(of(Key::Destination(id, member.addr)));
            }
        }
        let counter = |endpoint, count| Counter { id: fragment.id.clone(), endpoint, count };
        let endpoints = by_endpoint.into_iter().map(|(addr, count)| counter(Some(addr), count));
        [counter(None, whole)].into_iter().chain(endpoints).collect()
    }

    /// A fragment's frontends come with their addresses: an address without them refuses everything,
    /// also what another mode forwards.
    fn entries_last(&self) -> bool {
        false
    }

    fn stage(&self, key: &Key) -> Stage {
        match key {
            Key::Table(_) | Key::Set(..) | Key::Chain(..) | Key::Link(_) => Stage::Base,
            Key::Element(SetName::NodeAddresses | SetName::Servers, _) => Stage::Base,
            Key::Element(SetName::Addresses | SetName::Frontends(_), _) | Key::Address(_) => {
                Stage::Entry
            }
            Key::Element(..) | Key::Server(_) | Key::Destination(..) => Stage::Body,
        }
    }
}
