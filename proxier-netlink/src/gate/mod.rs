//! What backends share that let nf_tables decide about packets, and leave the forwarding to somebody
//! else: one table of chains that are always the same, and sets that hold the frontends.

mod rule;
mod set;
mod table;

use std::fmt::{self, Display};

use proxier_core::ir::{FrontendKey, Origin, WayIn};

pub use self::{
    rule::{RuleBuilder, classify, classify_own, enter},
    set::{Item, Kind, Shape, ip_bytes},
    table::{Content, Misshapen, Part, destroy, encode, read, try_out},
};
use crate::nft::Expr;

/// After connection tracking, before everything that translates.
// KERNEL: NF_IP_PRI_MANGLE (include/uapi/linux/netfilter_ipv4.h, v6.12); the same for IPv6.
pub const MANGLE: i32 = -150;

/// The two forms of frontends, which have sets of their own.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Way {
    /// An address of the Service.
    Address,
    /// An address of the node.
    NodePort,
}

impl Way {
    /// Both, in the order in which packets are compared with them.
    pub const ALL: [Self; 2] = [Self::Address, Self::NodePort];

    /// The form of a frontend.
    #[must_use]
    pub const fn of(key: &FrontendKey) -> Self {
        match key.way_in {
            WayIn::Address(_) => Self::Address,
            WayIn::Node(_) => Self::NodePort,
        }
    }
}

/// Every origin.
pub const ORIGINS: [Origin; 3] = [Origin::Pod, Origin::Node, Origin::External];

/// An origin in a name.
#[must_use]
pub const fn origin_name(origin: Origin) -> &'static str {
    match origin {
        Origin::External => "external",
        Origin::Node => "node",
        Origin::Pod => "pod",
    }
}

/// A chain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chain {
    /// Where it hangs; `None` when packets reach it from other chains only.
    pub base: Option<Base>,
    /// Its rules in order.
    pub rules: Vec<Rule>,
}

impl Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(base) = &self.base {
            writeln!(f, "{} hook {} priority {}", base.kind, base.hook, base.priority)?;
        }
        self.rules.iter().try_for_each(|rule| writeln!(f, "{rule}"))
    }
}

/// Where a base chain hangs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Base {
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// The number of the hook.
    pub hook: u32,
    /// Its place among the chains there.
    pub priority: i32,
}

/// A rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    /// What it does, for people; kept with it as its comment.
    pub text: String,
    /// What it does.
    pub exprs: Vec<Expr<'static>>,
}

impl Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
