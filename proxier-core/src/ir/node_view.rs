//! What backends need to know of the node.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use crate::name::{ByFamily, Family};

/// The node as backends see it: a value per family.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct NodeView(pub ByFamily<FamilyView>);

impl NodeView {
    /// The view of one family.
    #[must_use]
    pub const fn of(&self, family: Family) -> &FamilyView {
        self.0.of(family)
    }
}

/// The node in one family.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct FamilyView {
    /// Recognises packets of local pods; `None` when nothing can.
    pub detector: Option<Detector>,
    /// Where node ports answer.
    pub node_ports: NodePorts,
    /// Node ports answer on 127.0.0.0/8 too. Never set for IPv6.
    pub localhost_node_ports: bool,
    /// The node's interface addresses, sorted, without duplicates; may be unknown (empty).
    pub addresses: Vec<IpAddr>,
    /// The ranges cluster IPs come from; may be unknown (empty).
    pub service_cidrs: Vec<IpNet>,
}

/// Recognises packets of local pods.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub enum Detector {
    /// They come in on the interface of this name.
    Interface(String),
    /// They come in on an interface whose name starts so.
    InterfacePrefix(String),
    /// Their source is in this network.
    Source(IpNet),
}

/// The addresses node ports answer on.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub enum NodePorts {
    /// Every address the kernel calls local when the packet arrives, loopback apart.
    #[default]
    All,
    /// These, sorted, without duplicates.
    Listed(Vec<IpAddr>),
}
