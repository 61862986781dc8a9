//! Finding the frontend of a packet.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroU16,
    sync::Arc,
};

use crate::{
    ir::{Fragment, Frontend, FrontendKey, FrontendKind, WayIn},
    model::Store,
    name::{Family, FragmentId, Protocol},
    proxier::{Change, Update},
};

/// Where the model looks things up. No lookup may cost more than O(log n).
pub trait Lookup {
    /// The frontend that packets of this key come to.
    fn frontend(&self, key: &FrontendKey) -> Option<(&Arc<Fragment>, &Frontend)>;

    /// What sort of frontends an address has, if any: cluster IPs before others.
    fn kind_of(&self, address: IpAddr) -> Option<FrontendKind>;

    /// Says whether some Service has its health checked on this port.
    fn has_health_check(&self, family: Family, port: NonZeroU16) -> bool;
}

impl Lookup for Store {
    fn frontend(&self, key: &FrontendKey) -> Option<(&Arc<Fragment>, &Frontend)> {
        self.frontend(key)
    }

    fn kind_of(&self, address: IpAddr) -> Option<FrontendKind> {
        self.kind_of(address)
    }

    fn has_health_check(&self, family: Family, port: NonZeroU16) -> bool {
        self.has_health_check(family, port)
    }
}

/// The fragments of a node by what packets to them look like, for those who have fragments but no
/// [`Store`].
#[derive(Clone, Debug, Default)]
pub struct Index {
    fragments: BTreeMap<FragmentId, Arc<Fragment>>,
    frontends: BTreeMap<FrontendKey, FragmentId>,
    health_ports: BTreeMap<(Family, NonZeroU16), BTreeSet<FragmentId>>,
}

impl Index {
    /// Takes note of an update. O(log n) for each fragment in it.
    pub fn apply(&mut self, update: &Update) {
        match update {
            Update::Delta { changes, .. } => {
                for change in changes {
                    self.remove(change.id());
                    if let Change::Upsert(fragment) = change {
                        self.insert(fragment);
                    }
                }
            }
            Update::Reset { fragments, .. } => {
                *self = Self::default();
                fragments.iter().for_each(|fragment| self.insert(fragment));
            }
        }
    }

    fn insert(&mut self, fragment: &Arc<Fragment>) {
        let id = &fragment.id;
        for frontend in &fragment.frontends {
            self.frontends.insert(frontend.key, id.clone());
        }
        if let Some(port) = fragment.health_check_node_port {
            self.health_ports.entry((id.family, port)).or_default().insert(id.clone());
        }
        self.fragments.insert(id.clone(), Arc::clone(fragment));
    }

    fn remove(&mut self, id: &FragmentId) {
        let Some(fragment) = self.fragments.remove(id) else { return };
        for frontend in &fragment.frontends {
            // In the same update another fragment may have taken the frontend over.
            if self.frontends.get(&frontend.key) == Some(id) {
                self.frontends.remove(&frontend.key);
            }
        }
        let port = fragment.health_check_node_port.map(|port| (id.family, port));
        if let Some(port) = port
            && let Some(holders) = self.health_ports.get_mut(&port)
        {
            holders.remove(id);
            if holders.is_empty() {
                self.health_ports.remove(&port);
            }
        }
    }
}

impl Lookup for Index {
    fn frontend(&self, key: &FrontendKey) -> Option<(&Arc<Fragment>, &Frontend)> {
        let fragment = self.fragments.get(self.frontends.get(key)?)?;
        Some((fragment, fragment.frontends.iter().find(|frontend| frontend.key == *key)?))
    }

    fn kind_of(&self, address: IpAddr) -> Option<FrontendKind> {
        let way_in = WayIn::Address(address);
        let first = FrontendKey { way_in, port: NonZeroU16::MIN, protocol: Protocol::Sctp };
        let last = FrontendKey { way_in, port: NonZeroU16::MAX, protocol: Protocol::Udp };
        let keys = self.frontends.range(first..=last).map(|(key, _)| key);
        keys.filter_map(|key| self.frontend(key)).map(|(_, frontend)| frontend.kind).min()
    }

    fn has_health_check(&self, family: Family, port: NonZeroU16) -> bool {
        self.health_ports.contains_key(&(family, port))
    }
}
