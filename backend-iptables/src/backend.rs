//! The pure half of the mode.

use std::collections::BTreeMap;

use proxier_core::{
    Capabilities, Family, Mode, Spreading,
    ir::{Balance, Fragment, NodeView},
    spi::{Backend, Objects, PlanError, Stage},
};

use crate::{
    compile::{Compiler, check_detector},
    config::{Config, ConfigError},
    names::FixedNames,
    object::{Key, Object, Value},
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
            spreading: Spreading { balance: &[Balance::Random], weights: false, counters: false },
            limits: vec![
                "A new connection is compared with every service address before its own, one by one.",
                "Adding a rule makes the kernel check all chains that packets can reach, once a batch: \
                 some 0.2 s for 50,000 endpoints.",
                "Session affinity remembers the last 100 clients of an endpoint, unless module \
                 xt_recent was loaded with a larger ip_list_tot.",
            ],
        };
        Ok(Self { config, names, capabilities })
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
        Compiler::new(&self.config.prefix, &self.names, node, fragment, out).run()
    }

    fn recall(&self, _: &Fragment, _: &BTreeMap<Key, Value>) {}

    fn stage(&self, key: &Key) -> Stage {
        match &key.0 {
            Object::Table { .. } | Object::Base { .. } => Stage::Base,
            Object::Chain { kind: crate::object::ChainKind::Fixed, .. } => Stage::Base,
            Object::Chain { .. } => Stage::Body,
            Object::Entry { .. } | Object::Foreign { .. } => Stage::Entry,
        }
    }
}
