//! The backends of this build, as far as conformance cases ask about them.

use std::collections::BTreeMap;

use futures_util::FutureExt;
use proxier::{
    Family, ObjectName, Proxier, Update, engine::Engine, spi::Backend, testing::FakeKernel,
};
use proxier_testkit::cases::Subject;

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

#[cfg_attr(not(feature = "iptables"), expect(dead_code, reason = "no backend asks for it"))]
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
        let ours =
            op.fragment.as_ref().is_some_and(|id| id.service == *service && id.family == family);
        if ours && let Some(kind) = kind(&op.object) {
            *counts.entry(kind).or_default() += 1;
        }
    }
    Ok(counts)
}

#[cfg_attr(
    not(any(feature = "iptables", feature = "ipvs", feature = "nftables", feature = "userspace")),
    expect(dead_code, reason = "no backend asks for it")
)]
/// Programs a fake kernel, which never waits and must not be asked for nonsense.
fn program<B: Backend>(
    engine: &mut Engine<B, FakeKernel<B>>,
    update: Update,
) -> Result<(), String> {
    let outcome = engine.sync(update).now_or_never().ok_or("the fake kernel waits")?;
    let report = outcome.map_err(|error| error.to_string())?;
    if let Some(degraded) = report.degraded.first() {
        return Err(format!("{}: {}", degraded.id, degraded.reason));
    }
    engine.dataplane().violations.first().map_or(Ok(()), |violation| Err(violation.clone()))
}

#[cfg(feature = "iptables")]
mod iptables {
    use std::collections::BTreeSet;

    use proxier::{
        Mode,
        ir::NodeView,
        sim::{Packet, Remembered},
    };
    use proxier_backend_iptables::{
        Config, Iptables as Backend, Layout,
        names::{ServiceChain, endpoint_chain, service_chain},
        view::{Fate, Packet as ViewPacket, View},
    };
    use proxier_testkit::cases::{FakeNode, FlowVerdict, NameInput};

    use super::{
        BTreeMap, Engine, FakeKernel, Family, ObjectName, Subject, Update, count, program,
    };

    const PREFIX: &str = "KUBE";

    pub(super) struct Iptables;

    fn engine(layout: Layout) -> Result<Engine<Backend, FakeKernel<Backend>>, String> {
        let config = Config::default().layout(layout);
        let backend = Backend::new(config).map_err(|error| error.to_string())?;
        let kernel = FakeKernel::new(&backend, usize::MAX);
        Ok(Engine::new(backend, kernel, &Family::ALL))
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
            count(&engine(Layout::KubeProxy)?, &update, service, family, kind).map(Some)
        }

        fn fake(&self) -> Option<Box<dyn FakeNode>> {
            Some(Box::new(Fake { engine: engine(Layout::Tree).ok()? }))
        }
    }

    /// The backend's objects on a fake kernel.
    struct Fake {
        engine: Engine<Backend, FakeKernel<Backend>>,
    }

    impl FakeNode for Fake {
        fn program(&mut self, update: Update) -> Result<(), String> {
            program(&mut self.engine, update)
        }

        fn judge(&self, node: &NodeView, packet: &Packet, memory: &[Remembered]) -> FlowVerdict {
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
            let objects = self.engine.dataplane().objects.of(family);
            verdict(&View::new(self.engine.backend(), family, objects).judge(&packet))
        }

        fn listing(&self) -> String {
            let objects = &self.engine.dataplane().objects;
            let all = Family::ALL.iter().flat_map(|family| objects.of(*family));
            all.flat_map(|(key, value)| key.listing(value))
                .fold(String::new(), |text, rule| text + &rule + "\n")
        }
    }

    fn verdict(fates: &BTreeSet<Fate>) -> FlowVerdict {
        let mut to = BTreeMap::new();
        let mut others = Vec::new();
        for fate in fates {
            let Fate::Forwarded { to: addr, masqueraded } = fate else {
                others.push(fate);
                continue;
            };
            if to.insert(*addr, Some(*masqueraded)).is_some() {
                return FlowVerdict::Other(format!("{addr} with and without masquerade"));
            }
        }
        match (to.is_empty(), others.as_slice()) {
            (false, []) => FlowVerdict::Dnat(to),
            (true, [Fate::Accepted]) => FlowVerdict::Accept,
            (true, [Fate::Dropped]) => FlowVerdict::Drop,
            (true, [Fate::Rejected]) => FlowVerdict::Reject,
            (true, [Fate::Untouched]) => FlowVerdict::Untouched,
            _ => FlowVerdict::Other(format!("{fates:?}")),
        }
    }
}

#[cfg(feature = "ipvs")]
mod ipvs {
    use std::collections::BTreeSet;

    use proxier::{
        Mode,
        ir::NodeView,
        sim::{Packet, Remembered},
    };
    use proxier_backend_ipvs::{
        Config, Ipvs as Backend,
        view::{Fate, Packet as ViewPacket, View},
    };
    use proxier_testkit::cases::{FakeNode, FlowVerdict, NameInput};

    use super::{BTreeMap, Engine, FakeKernel, Family, ObjectName, Subject, Update, program};

    pub(super) struct Ipvs;

    impl Subject for Ipvs {
        fn mode(&self) -> Mode {
            Mode::Ipvs
        }

        fn name(&self, _: &NameInput) -> Option<String> {
            None
        }

        fn objects(
            &self,
            _: Update,
            _: &ObjectName,
            _: Family,
        ) -> Result<Option<BTreeMap<String, usize>>, String> {
            Ok(None)
        }

        fn fake(&self) -> Option<Box<dyn FakeNode>> {
            let backend = Backend::new(Config::default()).ok()?;
            let kernel = FakeKernel::new(&backend, usize::MAX);
            Some(Box::new(Fake { engine: Engine::new(backend, kernel, &Family::ALL) }))
        }
    }

    /// The backend's objects on a fake kernel.
    struct Fake {
        engine: Engine<Backend, FakeKernel<Backend>>,
    }

    impl FakeNode for Fake {
        fn program(&mut self, update: Update) -> Result<(), String> {
            program(&mut self.engine, update)
        }

        fn judge(&self, node: &NodeView, packet: &Packet, memory: &[Remembered]) -> FlowVerdict {
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
            verdict(&View::new(family, self.engine.dataplane().objects.of(family)).judge(&packet))
        }

        fn listing(&self) -> String {
            let objects = &self.engine.dataplane().objects;
            let all = Family::ALL.iter().flat_map(|family| objects.of(*family));
            all.fold(String::new(), |text, (key, value)| format!("{text}{key}\n{value}\n"))
        }
    }

    fn verdict(fates: &BTreeSet<Fate>) -> FlowVerdict {
        let mut to = BTreeMap::new();
        let mut others = Vec::new();
        for fate in fates {
            let Fate::Forwarded { to: addr, masqueraded } = fate else {
                others.push(fate);
                continue;
            };
            if to.insert(*addr, Some(*masqueraded)).is_some() {
                return FlowVerdict::Other(format!("{addr} with and without masquerade"));
            }
        }
        match (to.is_empty(), others.as_slice()) {
            (false, []) => FlowVerdict::Dnat(to),
            (true, [Fate::Dropped]) => FlowVerdict::Drop,
            (true, [Fate::Rejected]) => FlowVerdict::Reject,
            (true, [Fate::Untouched]) => FlowVerdict::Untouched,
            _ => FlowVerdict::Other(format!("{fates:?}")),
        }
    }
}

#[cfg(feature = "nftables")]
mod nftables {
    use std::collections::BTreeSet;

    use proxier::{
        Mode,
        ir::NodeView,
        sim::{Packet, Remembered},
    };
    use proxier_backend_nftables::{
        Config, Nftables as Backend,
        view::{Fate, Packet as ViewPacket, View},
    };
    use proxier_testkit::cases::{FakeNode, FlowVerdict, NameInput};

    use super::{BTreeMap, Engine, FakeKernel, Family, ObjectName, Subject, Update, program};

    pub(super) struct Nftables;

    impl Subject for Nftables {
        fn mode(&self) -> Mode {
            Mode::Nftables
        }

        fn name(&self, _: &NameInput) -> Option<String> {
            None
        }

        fn objects(
            &self,
            _: Update,
            _: &ObjectName,
            _: Family,
        ) -> Result<Option<BTreeMap<String, usize>>, String> {
            Ok(None)
        }

        fn fake(&self) -> Option<Box<dyn FakeNode>> {
            let backend = Backend::new(Config::default()).ok()?;
            let kernel = FakeKernel::new(&backend, usize::MAX);
            Some(Box::new(Fake { engine: Engine::new(backend, kernel, &Family::ALL) }))
        }
    }

    /// The backend's objects on a fake kernel.
    struct Fake {
        engine: Engine<Backend, FakeKernel<Backend>>,
    }

    impl FakeNode for Fake {
        fn program(&mut self, update: Update) -> Result<(), String> {
            program(&mut self.engine, update)
        }

        fn judge(&self, node: &NodeView, packet: &Packet, memory: &[Remembered]) -> FlowVerdict {
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
            verdict(&View::new(family, self.engine.dataplane().objects.of(family)).judge(&packet))
        }

        fn listing(&self) -> String {
            let objects = &self.engine.dataplane().objects;
            let all = Family::ALL.iter().flat_map(|family| objects.of(*family));
            all.fold(String::new(), |text, (key, value)| format!("{text}{key}\n{value}\n"))
        }
    }

    fn verdict(fates: &BTreeSet<Fate>) -> FlowVerdict {
        let mut to = BTreeMap::new();
        let mut others = Vec::new();
        for fate in fates {
            let Fate::Forwarded { to: addr, masqueraded } = fate else {
                others.push(fate);
                continue;
            };
            if to.insert(*addr, Some(*masqueraded)).is_some() {
                return FlowVerdict::Other(format!("{addr} with and without masquerade"));
            }
        }
        match (to.is_empty(), others.as_slice()) {
            (false, []) => FlowVerdict::Dnat(to),
            (true, [Fate::Dropped]) => FlowVerdict::Drop,
            (true, [Fate::Rejected]) => FlowVerdict::Reject,
            (true, [Fate::Untouched]) => FlowVerdict::Untouched,
            _ => FlowVerdict::Other(format!("{fates:?}")),
        }
    }
}

#[cfg(feature = "userspace")]
mod userspace {
    use proxier::{
        Mode,
        ir::NodeView,
        sim::{Packet, Remembered},
    };
    use proxier_backend_userspace::{
        Config, Ports, Userspace as Backend,
        view::{Fate, endpoints, judge},
    };
    use proxier_testkit::cases::{FakeNode, FlowVerdict, NameInput};

    use super::{BTreeMap, Engine, FakeKernel, Family, ObjectName, Subject, Update, program};

    pub(super) struct Userspace;

    impl Subject for Userspace {
        fn mode(&self) -> Mode {
            Mode::Userspace
        }

        fn name(&self, _: &NameInput) -> Option<String> {
            None
        }

        fn objects(
            &self,
            _: Update,
            _: &ObjectName,
            _: Family,
        ) -> Result<Option<BTreeMap<String, usize>>, String> {
            Ok(None)
        }

        fn fake(&self) -> Option<Box<dyn FakeNode>> {
            let backend = Backend::new(&Config::default(), Ports::default()).ok()?;
            let kernel = FakeKernel::new(&backend, usize::MAX);
            Some(Box::new(Fake { engine: Engine::new(backend, kernel, &Family::ALL) }))
        }
    }

    /// The backend's objects on a fake kernel.
    struct Fake {
        engine: Engine<Backend, FakeKernel<Backend>>,
    }

    impl FakeNode for Fake {
        fn program(&mut self, update: Update) -> Result<(), String> {
            program(&mut self.engine, update)
        }

        /// Who goes where by affinity is decided by the clock, in the process: its tests have it.
        fn judge(&self, node: &NodeView, packet: &Packet, _: &[Remembered]) -> FlowVerdict {
            let family = Family::of(packet.destination.ip());
            let objects = self.engine.dataplane().objects.of(family);
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

        fn listing(&self) -> String {
            let objects = &self.engine.dataplane().objects;
            let all = Family::ALL.iter().flat_map(|family| objects.of(*family));
            all.fold(String::new(), |text, (key, value)| format!("{text}{key}\n{value}\n"))
        }
    }
}
