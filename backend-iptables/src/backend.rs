//! The pure half of the mode.

use std::collections::BTreeMap;

use proxier_core::{
    Capabilities, Count, Counter, Family, Mode, Spreading,
    ir::{Balance, Fragment, NodeView},
    spi::{Backend, Objects, PlanError, Stage},
};

use crate::{
    compile::{Compiler, check_detector},
    config::{Config, ConfigError, Layout},
    names::{FixedNames, PortHash},
    object::{ChainKind, Content, Key, Object, Table, Value},
    skeleton::skeleton,
};

/// An operation of this mode.
pub(crate) type Op = proxier_core::spi::Op<Key, Value>;

/// The pure half of the iptables mode: which chains and rules a fragment needs.
#[derive(Debug)]
pub struct Iptables {
    config: Config,
    names: FixedNames,
    capabilities: Capabilities,
}

impl Iptables {
    /// Makes the pure half.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.validate()?;
        let names = FixedNames::new(&config.prefix);
        let capabilities = Capabilities {
            mode: Mode::Iptables,
            atomic: true,
            spreading: Spreading {
                balance: &[Balance::Random, Balance::RoundRobin],
                weights: true,
                counters: true,
            },
            limits: vec![
                match config.layout {
                    Layout::KubeProxy => {
                        "A new connection is compared with every service address before its own, one \
                         by one."
                    }
                    Layout::Tree => {
                        "Ports of one address are compared one by one, and so are the clients that a \
                         Service with session affinity remembers."
                    }
                },
                "Adding a rule makes the kernel check all chains that packets can reach, once a batch: \
                 some 0.2 s for 50,000 endpoints.",
                "Session affinity remembers the last 100 clients of an endpoint, unless module \
                 xt_recent was loaded with a larger ip_list_tot.",
            ],
        };
        Ok(Self { config, names, capabilities })
    }

    /// Makes the pure half for x_tables, whose limits are others.
    pub(crate) fn for_x_tables(config: Config) -> Result<Self, ConfigError> {
        let mut backend = Self::new(config)?;
        backend.capabilities.limits.retain(|limit| !limit.starts_with("Adding a rule"));
        backend.capabilities.spreading.counters = false;
        backend.capabilities.limits.push(
            "Every change replaces whole tables, some 0.7 s for 50,000 endpoints, one table after the \
             other. Changes should be collected for at least a second.",
        );
        Ok(backend)
    }

    /// The settings.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) const fn names(&self) -> &FixedNames {
        &self.names
    }
}

impl Backend for Iptables {
    type Key = Key;
    type Value = Value;
    type Memo = ();

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn skeleton(&self, family: Family, node: &NodeView) -> BTreeMap<Key, Value> {
        skeleton(&self.config, &self.names, family, node.of(family))
    }

    fn compile(
        &self,
        node: &NodeView,
        fragment: &Fragment,
        (): &(),
        out: &mut Objects<Key, Value>,
    ) -> Result<(), PlanError> {
        let node = node.of(fragment.id.family);
        check_detector(node)?;
        Compiler::new(&self.config, &self.names, node, fragment, out).run()
    }

    /// Each connection passes the last rule of its endpoint's chain once.
    fn counters(
        &self,
        _: &NodeView,
        fragment: &Fragment,
        (): &(),
        read: &BTreeMap<Key, Count>,
    ) -> Vec<Counter> {
        let family = fragment.id.family;
        let hash = PortHash::new(&fragment.id.port_text(), fragment.id.protocol);
        let counter = |endpoint, count| Counter { id: fragment.id.clone(), endpoint, count };
        let of = |addr| {
            let chain = hash.endpoint_chain(&self.config.prefix, addr);
            let key = Key::chain(family, Table::Nat, ChainKind::Endpoint, chain);
            read.get(&key).map(|count| counter(Some(addr), *count))
        };
        let endpoints: Vec<_> =
            fragment.reachable().iter().filter_map(|member| of(member.addr)).collect();
        let none = Count { connections: Some(0), ..Count::default() };
        let all = endpoints.iter().fold(none, |sum, it| sum.plus(it.count));
        std::iter::once(counter(None, all)).chain(endpoints).collect()
    }

    fn recall(&self, _: &Fragment, _: &BTreeMap<Key, Value>) {}

    fn rules(&self, key: &Key, value: &Value) -> Option<(&'static str, usize)> {
        let (Object::Chain { table, .. } | Object::Entry { table, .. }) = &key.0 else {
            return None;
        };
        match &value.0 {
            Content::Rules(rules) => Some((table.name(), rules.iter().count())),
            Content::Entry { .. } => Some((table.name(), 1)),
            Content::Exists | Content::Shared | Content::Unknown => None,
        }
    }

    fn stage(&self, key: &Key) -> Stage {
        match &key.0 {
            Object::Table { .. } | Object::Base { .. } => Stage::Base,
            Object::Chain { kind: ChainKind::Fixed, .. } => Stage::Base,
            Object::Chain { .. } => Stage::Body,
            Object::Entry { .. } | Object::Foreign { .. } => Stage::Entry,
        }
    }
}
