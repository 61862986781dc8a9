//! What rules of this mode do besides what those of others do. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxier_core::Family;
use proxier_netlink::{
    gate::{Rule, RuleBuilder, ip_bytes},
    nft::{CmpOp, CtDirection, CtKey, CtStatus, Expr, MetaKey, Nat, NatFlags, Reg, SocketKey},
    spi::nft_family,
};

/// Capturing.
pub(crate) trait Capture: Sized {
    /// A transparent socket of somebody is waiting for it, or for what is like it.
    fn transparent(self) -> Self;
    /// A transparent socket of somebody is waiting for exactly this.
    fn ours(self) -> Self;
    /// Another proxier, or another mode, took the connection before.
    fn translated(self) -> Self;
    /// It is no answer.
    fn original(self) -> Self;
    /// Sets bits of its mark.
    fn set_mark(self, bits: u32) -> Self;
    /// Clears bits of its mark.
    fn clear_mark(self, bits: u32) -> Self;
    /// Hands it to a listener.
    fn tproxy(self, port: u16) -> Self;
    /// Translates the destination to an address of this machine and, where none is known, to one of
    /// the interface that the packet came in on.
    fn redirect(self, at: Option<IpAddr>, port: u16) -> Rule;
    /// Translates the destination to what it is.
    fn keep_destination(self) -> Rule;
}

impl Capture for RuleBuilder {
    fn transparent(self) -> Self {
        socket(self, SocketKey::TRANSPARENT, 1)
    }

    fn ours(self) -> Self {
        socket(self.transparent(), SocketKey::WILDCARD, 0)
    }

    fn translated(self) -> Self {
        self.ct(CtKey::STATUS).bitwise(CtStatus::DST_NAT.0, 0).cmp(CmpOp::NE, &[0; 4])
    }

    fn original(self) -> Self {
        self.ct(CtKey::DIRECTION).cmp(CmpOp::EQ, &[CtDirection::ORIGINAL.0])
    }

    fn set_mark(self, bits: u32) -> Self {
        let set = Expr::MetaSet { key: MetaKey::MARK, sreg: Reg::R1 };
        self.meta(MetaKey::MARK, Reg::R1).bitwise(!bits, bits).push(set)
    }

    fn clear_mark(self, bits: u32) -> Self {
        let set = Expr::MetaSet { key: MetaKey::MARK, sreg: Reg::R1 };
        self.meta(MetaKey::MARK, Reg::R1).bitwise(!bits, 0).push(set)
    }

    fn tproxy(self, port: u16) -> Self {
        let family = self.family();
        let at = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let (addr, port) = (Some(Reg::R1), port.to_be_bytes().to_vec().into());
        self.push(Expr::Immediate { dreg: Reg::R1, value: ip_bytes(at).into() })
            .push(Expr::Immediate { dreg: Reg::R2, value: port })
            .push(Expr::Tproxy { family: nft_family(family), addr, port: Some(Reg::R2) })
    }

    // KERNEL: there the interface has to have one, which those of pods need not have
    // (net/netfilter/nf_nat_redirect.c, v6.12).
    fn redirect(self, at: Option<IpAddr>, port: u16) -> Rule {
        let port = port.to_be_bytes().to_vec().into();
        let Some(at) = at else {
            let ports = Some((Reg::R1, Reg::R1));
            let rule = self.push(Expr::Immediate { dreg: Reg::R1, value: port });
            return rule.push(Expr::Redirect { flags: NatFlags::NONE, ports }).end();
        };
        let (family, at_port) = (nft_family(self.family()), Reg::slot(4));
        self.push(Expr::Immediate { dreg: Reg::R1, value: ip_bytes(at).into() })
            .push(Expr::Immediate { dreg: at_port, value: port })
            .push(Expr::Nat(Nat::dnat(family, Reg::R1, Some(at_port))))
            .end()
    }

    fn keep_destination(self) -> Rule {
        let family = nft_family(self.family());
        self.destination().push(Expr::Nat(Nat::dnat(family, Reg::R1, None))).end()
    }
}

fn socket(rule: RuleBuilder, key: SocketKey, value: u8) -> RuleBuilder {
    let dreg = Reg::R1;
    rule.push(Expr::Socket { key, dreg, level: None }).cmp(CmpOp::EQ, &[value])
}
