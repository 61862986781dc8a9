//! The pure half of the mode.

use std::collections::BTreeMap;

use proxier_core::{
    Capabilities, Count, Counter, Family, Mode, Spreading,
    ir::{Balance, Fragment, Frontend, NodeView, Pool},
    spi::{Backend, Objects, PlanError, Stage},
};

use crate::{
    compile::{self, Memo},
    config::{Config, ConfigError},
    object::{ChainName, Content, Element, Endpoint, Key, Object, Says, Value},
    skeleton::skeleton,
    slots::NOBODY,
};

/// An operation of this mode.
pub(crate) type Op = proxier_core::spi::Op<Key, Value>;

/// The pure half of the nftables mode: which elements a fragment needs.
#[derive(Debug)]
pub struct Nftables {
    config: Config,
    capabilities: Capabilities,
}

impl Nftables {
    /// Makes the pure half.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.validate()?;
        let capabilities = Capabilities {
            mode: Mode::Nftables,
            atomic: true,
            spreading: Spreading {
                balance: &[Balance::Random, Balance::RoundRobin, Balance::SourceHash],
                weights: true,
                counters: true,
            },
            limits: vec![
                "A new connection is looked up in one set for each number of endpoints that some \
                 Service has, until one holds its address and port.",
                "A Service port with session affinity has chains of its own, and adding or removing \
                 one makes the kernel walk those of all of them.",
                "A Service port that spreads round robin or by source has chains of its own, too.",
                "Counters count the connections of a Service port, not packets, bytes or endpoints.",
                "Weights are rounded where a pool would have more than 4,096 slots.",
                "Session affinity remembers 262,144 clients, over all Services of a family.",
                "Health-check node ports are not let through other tables: an accept here is not \
                 final there.",
                "Node ports answer on 127.0.0.0/8 only where the sysctl \
                 net.ipv4.conf.all.route_localnet is set; this library never sets it.",
            ],
        };
        Ok(Self { config, capabilities })
    }

    /// The settings.
    pub const fn config(&self) -> &Config {
        &self.config
    }
}

impl Backend for Nftables {
    type Key = Key;
    type Value = Value;
    type Memo = Memo;

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
        memo: &Memo,
        out: &mut Objects<Key, Value>,
    ) -> Result<Memo, PlanError> {
        compile::compile(node.of(fragment.id.family), fragment, memo, out)
    }

    fn recall(&self, fragment: &Fragment, dumped: &BTreeMap<Key, Value>) -> Memo {
        Memo {
            cluster: recall(fragment, Pool::Cluster, dumped),
            local: recall(fragment, Pool::Local, dumped),
        }
    }

    fn counters(
        &self,
        _node: &NodeView,
        fragment: &Fragment,
        _memo: &Memo,
        read: &BTreeMap<Key, Count>,
    ) -> Vec<Counter> {
        let counted = |it: &Frontend| {
            let element = Element::Frontend { says: Says::Counted, frontend: it.key };
            read.get(&Key::new(fragment.id.family, Object::Element(element)))
        };
        let counts = fragment.frontends.iter().filter_map(counted);
        let count = counts.fold(Count::default(), |sum, count| sum.plus(*count));
        vec![Counter { id: fragment.id.clone(), endpoint: None, count }]
    }

    fn entries_last(&self) -> bool {
        // No element makes the kernel check anything, but for verdict maps, which few Services need.
        false
    }

    fn stage(&self, key: &Key) -> Stage {
        match &key.object {
            Object::Table | Object::Set(_) => Stage::Base,
            Object::Chain(
                ChainName::Remember(_) | ChainName::Spread(..) | ChainName::Sticky(..),
            ) => Stage::Body,
            Object::Chain(_) => Stage::Base,
            Object::Pick(_) | Object::Stray(_) => Stage::Body,
            Object::Element(element) => match element {
                Element::Endpoint { .. }
                | Element::Frontend { .. }
                | Element::Source(_)
                | Element::Hairpin(_)
                | Element::Member { .. }
                | Element::Odd { .. } => Stage::Body,
                Element::Size { .. }
                | Element::Remember(_)
                | Element::Spread { .. }
                | Element::Sticky { .. }
                | Element::Address { .. }
                | Element::NodeAddress(_) => Stage::Entry,
            },
        }
    }
}

/// The slots of a pool as the first frontend that has any shows them.
fn recall(fragment: &Fragment, pool: Pool, dumped: &BTreeMap<Key, Value>) -> Box<[Endpoint]> {
    let family = fragment.id.family;
    for frontend in &fragment.frontends {
        let at = |slot| {
            let element = Element::Endpoint { pool, frontend: frontend.key, slot };
            Key::new(family, Object::Element(element))
        };
        let mut slots = Vec::new();
        for (key, value) in dumped.range(at(0)..=at(u32::MAX)) {
            let Object::Element(Element::Endpoint { slot, .. }) = &key.object else { continue };
            let Content::Endpoint(endpoint) = &value.0 else { continue };
            let slot = usize::try_from(*slot).unwrap_or(usize::MAX);
            // What is far behind the others was not written by us.
            if slot > slots.len() + MOST_LOST {
                break;
            }
            slots.resize(slot, NOBODY);
            slots.push(*endpoint);
        }
        if !slots.is_empty() {
            return slots.into();
        }
    }
    Box::default()
}

/// Slots in a row that may have been lost.
const MOST_LOST: usize = 1024;
