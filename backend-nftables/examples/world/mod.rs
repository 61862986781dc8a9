//! What the examples share: many Services, and what the process takes.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use proxier_core::{
    Family, FragmentId, ObjectName, Protocol,
    ir::{
        Detector, FamilyView, Fragment, Frontend, FrontendKey, FrontendKind, Member, NodeView,
        Pool, Snat, Verdict, Verdicts, WayIn,
    },
};

/// A node whose pods are in 10.128.0.0/9.
pub fn node() -> Arc<NodeView> {
    let mut node = NodeView::default();
    node.0.v4 = FamilyView {
        detector: Some(Detector::Source("10.128.0.0/9".parse().unwrap())),
        ..FamilyView::default()
    };
    Arc::new(node)
}

/// The address of a Service.
pub fn vip(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a60_0000 + index)
}

/// One Service port with a cluster IP; `first` numbers its endpoints.
pub fn fragment(index: u32, endpoints: u32, first: u32) -> Arc<Fragment> {
    let forward = |snat| Verdict::Forward { pool: Pool::Cluster, snat };
    let (pod, other) = (forward(Snat::Preserve), forward(Snat::Masquerade));
    let ip: IpAddr = vip(index).into();
    let cluster = (first..first + endpoints).map(|number| {
        let ip = Ipv4Addr::from_bits(0x0a80_0000 + index * 16 + number);
        Member::new((ip, 8080).into(), number == 0)
    });
    let id = FragmentId {
        service: ObjectName::new("shop", &format!("service-{index}")),
        port: "web".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    };
    let frontend = Frontend {
        kind: FrontendKind::ClusterIp,
        key: FrontendKey {
            way_in: WayIn::Address(ip),
            port: 80.try_into().unwrap(),
            protocol: Protocol::Tcp,
        },
        sources: None,
        verdicts: Verdicts { pod, node: other, external: other },
    };
    Arc::new(Fragment::new(id, vec![frontend], cluster.collect()))
}

/// A line of `/proc/self/status` in KiB: `VmRSS`, what is resident, `VmHWM`, the most that ever was.
pub fn memory_kib(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or_default()
}
