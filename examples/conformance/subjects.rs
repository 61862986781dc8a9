//! The backends of this build, as far as conformance cases ask about them.
#![cfg_attr(
    not(all(feature = "iptables", feature = "ipvs", feature = "nftables", feature = "userspace")),
    allow(dead_code, reason = "some backends ask for it")
)]

use std::collections::{BTreeMap, BTreeSet};

use futures_util::FutureExt;
use proxier::{
    Family, Proxier, Update,
    engine::Engine,
    ir::NodeView,
    sim::{Fate, Packet, Remembered},
    spi::Backend,
    testing::FakeKernel,
};
use proxier_testkit::cases::{FakeNode, FlowVerdict, Subject};

/// All of them.
pub(crate) fn all() -> Vec<Box<dyn Subject>> {
    vec![
        #[cfg(feature = "iptables")]
        Box::new(iptables::Iptables),
        #[cfg(feature = "ipvs")]
        Box::new(ipvs::Ipvs),
        #[cfg(feature = "nftables")]
        Box::new(nftables::Nftables),
        #[cfg(feature = "userspace")]
        Box::new(userspace::Userspace),
    ]
}

/// A backend whose objects can be looked at as packets meet them.
trait Judge: Backend {
    /// What becomes of a packet of a family, by the objects of that family.
    fn judge(
        &self,
        objects: &BTreeMap<Self::Key, Self::Value>,
        node: &NodeView,
        packet: &Packet,
        memory: &[Remembered],
    ) -> FlowVerdict;

    /// An object, for people.
    fn listing(key: &Self::Key, value: &Self::Value) -> String {
        format!("{key}\n{value}\n")
    }
}

/// A backend's objects on a fake kernel.
struct Fake<B: Backend> {
    engine: Engine<B, FakeKernel<B>>,
}

impl<B: Judge> Fake<B> {
    fn new(backend: B) -> Self {
        let kernel = FakeKernel::new(&backend, usize::MAX);
        Self { engine: Engine::new(backend, kernel, &Family::ALL) }
    }
}

impl<B: Judge> FakeNode for Fake<B> {
    /// The fake kernel never waits and must not be asked for nonsense.
    fn program(&mut self, update: Update) -> Result<(), String> {
        let outcome = self.engine.sync(update).now_or_never().ok_or("the fake kernel waits")?;
        let report = outcome.map_err(|error| error.to_string())?;
        if let Some(degraded) = report.degraded.first() {
            return Err(format!("{}: {}", degraded.id, degraded.reason));
        }
        let violation = self.engine.dataplane().violations.first();
        violation.map_or(Ok(()), |violation| Err(violation.clone()))
    }

    fn judge(&self, node: &NodeView, packet: &Packet, memory: &[Remembered]) -> FlowVerdict {
        let family = Family::of(packet.destination.ip());
        let objects = self.engine.dataplane().objects.of(family);
        self.engine.backend().judge(objects, node, packet, memory)
    }

    fn listing(&self) -> String {
        let objects = &self.engine.dataplane().objects;
        let all = Family::ALL.iter().flat_map(|family| objects.of(*family));
        all.map(|(key, value)| B::listing(key, value)).collect()
    }
}

/// What became of a packet, as a verdict.
fn verdict(fate: &Fate) -> FlowVerdict {
    match fate {
        Fate::Accepted => FlowVerdict::Accept,
        Fate::Dropped => FlowVerdict::Drop,
        Fate::Forwarded { to, masqueraded } => {
            FlowVerdict::Dnat([(*to, Some(*masqueraded))].into())
        }
        Fate::Rejected => FlowVerdict::Reject,
        Fate::Untouched => FlowVerdict::Untouched,
        Fate::Masqueraded | _ => FlowVerdict::Other(format!("{fate:?}")),
    }
}

/// One verdict for what may become of a packet: all of it is forwarded, or all of it is not.
fn all_of(fates: &BTreeSet<Fate>) -> FlowVerdict {
    let mut fates = fates.iter().map(verdict);
    let Some(first) = fates.next() else { return FlowVerdict::Other("nothing".to_owned()) };
    fates.fold(first, |all, fate| match (all, fate) {
        (FlowVerdict::Dnat(mut all), FlowVerdict::Dnat(more)) => {
            for (addr, masqueraded) in more {
                if all.insert(addr, masqueraded).is_some() {
                    let text = format!("{addr} with and without masquerade");
                    return FlowVerdict::Other(text);
                }
            }
            FlowVerdict::Dnat(all)
        }
        (all, fate) => FlowVerdict::Other(format!("{all}, or {fate}")),
    })
}

#[cfg(feature = "iptables")]
mod iptables {
    use proxier::{Mode, ObjectName};
    use proxier_backend_iptables::{
        Config, Iptables as Backend, Layout,
        names::{ServiceChain, endpoint_chain, service_chain},
        view::{Packet as ViewPacket, View},
    };
    use proxier_testkit::cases::NameInput;

    use super::*;

    const PREFIX: &str = "KUBE";

    pub(super) struct Iptables;

    fn fake(layout: Layout) -> Result<Fake<Backend>, String> {
        let backend = Backend::new(Config::default().layout(layout));
        backend.map(Fake::new).map_err(|error| error.to_string())
    }

    /// Counts the objects that a plan creates for one Service in one family; `kind` names the sort of
    /// an object, or none for what is not counted.
    fn count(
        proxier: &dyn Proxier,
        update: &Update,
        service: &ObjectName,
        family: Family,
        kind: impl Fn(&str) -> Option<String>,
    ) -> Result<BTreeMap<String, usize>, String> {
        let plan = proxier.plan(update);
        if let Some(refused) = plan.refused.first() {
            return Err(format!("{}: {}", refused.id, refused.reason));
        }
        let mut counts = BTreeMap::new();
        for op in &plan.ops {
            let ours = op
                .fragment
                .as_ref()
                .is_some_and(|id| id.service == *service && id.family == family);
            if ours && let Some(kind) = kind(&op.object) {
                *counts.entry(kind).or_default() += 1;
            }
        }
        Ok(counts)
    }

    impl Subject for Iptables {
        fn mode(&self) -> Mode {
            Mode::Iptables
        }

        fn name(&self, input: &NameInput) -> Option<String> {
            let text = if input.port.is_empty() {
                format!("{}/{}", input.ns, input.name)
            } else {
                format!("{}/{}:{}", input.ns, input.name, input.port)
            };
            let kind = match input.kind.as_str() {
                "EXT" => ServiceChain::External,
                "FW" => ServiceChain::Firewall,
                "SVC" => ServiceChain::Cluster,
                "SVL" => ServiceChain::Local,
                "SEP" => {
                    let endpoint = input.endpoint.as_ref()?.parse().ok()?;
                    return Some(endpoint_chain(PREFIX, &text, input.proto, endpoint).to_string());
                }
                _ => return None,
            };
            Some(service_chain(PREFIX, kind, &text, input.proto).to_string())
        }

        fn objects(
            &self,
            update: Update,
            service: &ObjectName,
            family: Family,
        ) -> Result<Option<BTreeMap<String, usize>>, String> {
            // "chain ip nat KUBE-SVC-…"
            let kind = |object: &str| {
                let name = object.strip_prefix("chain ")?.rsplit(' ').next()?;
                let (kind, _) = name.strip_prefix(PREFIX)?.strip_prefix('-')?.split_once('-')?;
                Some(kind.to_owned())
            };
            count(&fake(Layout::KubeProxy)?.engine, &update, service, family, kind).map(Some)
        }

        fn fake(&self) -> Option<Box<dyn FakeNode>> {
            Some(Box::new(fake(Layout::Tree).ok()?))
        }
    }

    impl Judge for Backend {
        fn judge(
            &self,
            objects: &BTreeMap<Self::Key, Self::Value>,
            node: &NodeView,
            packet: &Packet,
            memory: &[Remembered],
        ) -> FlowVerdict {
            let family = Family::of(packet.destination.ip());
            let mut recent = BTreeMap::new();
            for it in memory.iter().filter(|it| it.client == packet.source) {
                let (text, protocol) = (it.id.port_text(), it.id.protocol);
                let list = endpoint_chain(PREFIX, &text, protocol, it.member).to_string();
                let age = recent.entry(list).or_insert(it.age);
                *age = it.age.min(*age);
            }
            let packet = ViewPacket {
                source: packet.source,
                input: packet.input.as_deref(),
                destination: packet.destination,
                protocol: packet.protocol,
                local: &node.of(family).addresses,
                recent: &recent,
            };
            all_of(&View::new(self, family, objects).judge(&packet))
        }

        fn listing(key: &Self::Key, value: &Self::Value) -> String {
            key.listing(value).into_iter().map(|rule| rule + "\n").collect()
        }
    }
}

#[cfg(feature = "ipvs")]
mod ipvs {
    use proxier::Mode;
    use proxier_backend_ipvs::{
        Config, Ipvs as Backend,
        view::{Packet as ViewPacket, View},
    };

    use super::*;

    pub(super) struct Ipvs;

    impl Subject for Ipvs {
        fn mode(&self) -> Mode {
            Mode::Ipvs
        }

        fn fake(&self) -> Option<Box<dyn FakeNode>> {
            Some(Box::new(Fake::new(Backend::new(Config::default()).ok()?)))
        }
    }

    impl Judge for Backend {
        fn judge(
            &self,
            objects: &BTreeMap<Self::Key, Self::Value>,
            node: &NodeView,
            packet: &Packet,
            memory: &[Remembered],
        ) -> FlowVerdict {
            let family = Family::of(packet.destination.ip());
            let own = memory.iter().filter(|it| it.client == packet.source);
            let memory: Vec<_> = own.map(|it| (it.key, it.member, it.age)).collect();
            let packet = ViewPacket {
                source: packet.source,
                input: packet.input.as_deref(),
                destination: packet.destination,
                protocol: packet.protocol,
                local: &node.of(family).addresses,
                memory: &memory,
            };
            all_of(&View::new(family, objects).judge(&packet))
        }
    }
}

#[cfg(feature = "nftables")]
mod nftables {
    use proxier::Mode;
    use proxier_backend_nftables::{
        Config, Nftables as Backend,
        view::{Packet as ViewPacket, View},
    };

    use super::*;

    pub(super) struct Nftables;

    impl Subject for Nftables {
        fn mode(&self) -> Mode {
            Mode::Nftables
        }

        fn fake(&self) -> Option<Box<dyn FakeNode>> {
            Some(Box::new(Fake::new(Backend::new(Config::default()).ok()?)))
        }
    }

    impl Judge for Backend {
        fn judge(
            &self,
            objects: &BTreeMap<Self::Key, Self::Value>,
            node: &NodeView,
            packet: &Packet,
            memory: &[Remembered],
        ) -> FlowVerdict {
            let family = Family::of(packet.destination.ip());
            let own = memory.iter().filter(|it| it.client == packet.source);
            let memory: Vec<_> = own.map(|it| (it.id.clone(), it.member, it.age)).collect();
            let packet = ViewPacket {
                source: packet.source,
                input: packet.input.as_deref(),
                destination: packet.destination,
                protocol: packet.protocol,
                local: &node.of(family).addresses,
                memory: &memory,
            };
            all_of(&View::new(family, objects).judge(&packet))
        }
    }
}

#[cfg(feature = "userspace")]
mod userspace {
    use proxier::Mode;
    use proxier_backend_userspace::{
        Config, Ports, Userspace as Backend,
        view::{Fate, endpoints, judge},
    };

    use super::*;

    pub(super) struct Userspace;

    impl Subject for Userspace {
        fn mode(&self) -> Mode {
            Mode::Userspace
        }

        fn fake(&self) -> Option<Box<dyn FakeNode>> {
            let backend = Backend::new(&Config::default(), Ports::default());
            Some(Box::new(Fake::new(backend.ok()?)))
        }
    }

    impl Judge for Backend {
        /// Who goes where by affinity is decided by the clock, in the process: its tests have it.
        fn judge(
            &self,
            objects: &BTreeMap<Self::Key, Self::Value>,
            node: &NodeView,
            packet: &Packet,
            _: &[Remembered],
        ) -> FlowVerdict {
            let family = Family::of(packet.destination.ip());
            match judge(objects, node.of(family), packet) {
                Fate::Captured(origin) => {
                    let to = endpoints(objects, packet, origin).into_iter();
                    FlowVerdict::Dnat(to.map(|(addr, changed)| (addr, Some(changed))).collect())
                }
                Fate::Drop => FlowVerdict::Drop,
                Fate::Reject => FlowVerdict::Reject,
                Fate::Untouched => FlowVerdict::Untouched,
                Fate::Odd(what) => FlowVerdict::Other(what),
            }
        }
    }
}
