//! Netlink sockets, nf_tables transactions, conntrack and IPVS for proxier's backends.
//!
//! What it does not do: decide anything. It has no notion of Services, plans or retries beyond a
//! lost race ([`spi`] alone knows the engine, to say in its terms what went wrong, and [`gate`] alone
//! frontends, for the rules that two backends share); it encodes what it is told, sends it, and says
//! precisely what the kernel answered.
//! Wherever a value can borrow, it borrows: encoding allocates nothing but the one buffer that is
//! sent, and rules can be read without copying them.
//!
//! ```no_run
//! use proxier_netlink::NetNs;
//! use proxier_netlink::nft::{
//!     CmpOp, Family, MetaKey, NftError, NftSocket, Reg, RuleFilter, RuleSpec, Transaction,
//! };
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let mut sock = NftSocket::open(&NetNs::Current)?;
//! let mut tx = Transaction::new();
//! tx.op(0);
//! tx.new_chain(Family::Ipv4, "nat", "KUBE-SVC-X");
//! tx.op(1);
//! let spec = RuleSpec::insert(Family::Ipv4, "nat", "KUBE-SERVICES");
//! tx.rule(spec.comment("shop/cart cluster IP").echo(), |e| {
//!     e.meta(MetaKey::L4PROTO, Reg::R1).cmp(Reg::R1, CmpOp::EQ, &[6]);
//!     e.counter().jump("KUBE-SVC-X");
//! });
//! match sock.commit(&tx).await {
//!     Ok(committed) => assert_eq!(committed.handles[0].tag, Some(1)),
//!     // One operation of the caller is to blame, and nothing has changed.
//!     Err(NftError::Refused(refusal)) => eprintln!("{refusal} ({:?})", refusal.tag),
//!     Err(other) => return Err(other.into()),
//! }
//! let filter = RuleFilter::chain(Family::Ipv4, "nat", "KUBE-SERVICES");
//! let handles = sock.fold_rules(filter, Vec::new, |all, rule| all.push(rule.handle)).await?;
//! # drop(handles);
//! # Ok(())
//! # }
//! ```
//!
//! # Privileges and kernel features
//!
//! Opening a socket needs none; everything else needs CAP_NET_ADMIN in the user namespace of the
//! network namespace. Entering another network namespace also needs CAP_SYS_ADMIN in one's own user
//! namespace. The kernel needs `nf_tables`, for conntrack `nf_conntrack_netlink`, and for
//! [`ExprWriter::xt_match`](nft::ExprWriter::xt_match) and its like `nft_compat`, for [`ipvs`] `ip_vs`.
//!
//! # Tests
//!
//! Tests that touch the kernel make network namespaces and need root, `nft`, `iptables` and
//! `conntrack`. One compares the encoder with libnftnl through the crate `nftnl`, a dev-dependency
//! that needs C libraries at build time (Debian: `libnftnl-dev libmnl-dev pkg-config`). Nothing that
//! ships links them.
//!
//! # Features
//!
//! | Feature | Adds |
//! |---|---|
//! | `links` | `dummy`: a dummy link and its addresses, through the crate `rtnetlink` |

#![deny(unsafe_op_in_unsafe_fn)]

mod ack;
mod addresses;
mod batch;
pub mod ct;
mod dec;
#[cfg(feature = "links")]
pub mod dummy;
mod enc;
mod foreign;
pub mod gate;
pub mod ipvs;
mod netns;
mod nfnl_listen;
pub mod nft;
mod sock;
pub mod spi;

pub use ack::{Ack, ErrorKind, errno_name};
pub use addresses::{Addresses, AddressesError};
pub use foreign::ForeignChanges;
pub use netns::{NetNs, NetNsError};
pub use nfnl_listen::{Change, Event, Events, EventsError};
pub use sock::OpenError;
