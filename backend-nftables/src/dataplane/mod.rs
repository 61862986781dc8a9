//! The I/O half of the mode: transactions, reading back, removing.

mod batch;
mod error;
mod read;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use async_trait::async_trait;
use proxier_core::{
    ByFamily, Count, Family,
    conntrack::{FlowFilter, Forgotten},
    ir::Pool,
    spi::{CommitError, Dataplane, ErrorKind},
};
use proxier_netlink::{
    ForeignChanges, NetNs, OpenError,
    ct::Conntrack,
    nft::{Element as NftElement, NftError, NftSocket, TableDump, Transaction},
    spi::{self, read_error},
};
use tracing::{debug, trace};

pub(crate) use self::batch::{Batch, Handles};
use self::{
    error::{commit_error, half_way},
    read::Reader,
};
use crate::{
    backend::{Nftables, Op},
    config::Config,
    field::{family_name, nft_family},
    object::{Content, Element, Key, Object, POOLS, PortId, SetName, Value},
};

/// What the comments of our tables begin with.
const MAKER: &str = "made by proxier";
/// The comment of our tables. One with another layout of sets and chains is made anew.
const LAYOUT: &str = "made by proxier, layout 3";

/// Operations sent at once where the socket takes large batches: some 15 ms of the kernel's time. With half
/// as many a first sync takes a third longer; with more it takes as long, and more memory.
const BATCH_OPS: usize = 12_288;
/// Bytes of an operation, at most, as long as it is one on an element.
const OP_BYTES: usize = 160;
/// Of more operations than this the kernel need not notify us.
const MOST_NOTIFIED: usize = 512;
/// How often stale affinities are looked for while others expire.
const ATTEMPTS: u32 = 5;

/// The I/O half of the nftables mode: one netlink socket to nf_tables, one to conntrack.
pub struct NftablesDataplane {
    nft: NftSocket,
    conntrack: Conntrack,
    config: Config,
    /// What our tables carry.
    mark: Vec<u8>,
    foreign: ForeignChanges,
    /// Nothing was committed since the last dump.
    fresh: ByFamily<bool>,
}

impl NftablesDataplane {
    /// Opens the sockets. Reads and changes nothing.
    ///
    /// # Errors
    /// [`OpenError`]: the namespace cannot be entered, there is no tokio runtime, or the kernel has
    /// no netfilter sockets.
    pub fn open(backend: &Nftables, netns: &NetNs) -> Result<Self, OpenError> {
        let nft = NftSocket::open(netns)?;
        let foreign = ForeignChanges::new(netns.clone(), nft.portid());
        Ok(Self {
            nft,
            foreign,
            conntrack: Conntrack::open(netns)?,
            config: backend.config().clone(),
            mark: mark(),
            fresh: ByFamily::default(),
        })
    }

    /// The table of our name, if it is ours to change; `Err` if it is somebody else's.
    async fn table(&mut self, family: Family) -> Result<Option<Found>, CommitError> {
        let tables = self.nft.tables(nft_family(family)).await.map_err(read_error)?;
        let Some(table) = tables.into_iter().find(|it| it.name == self.config.table) else {
            return Ok(None);
        };
        let object = format!("table {} {}", family_name(family), table.name);
        if table.flags & TableDump::OWNER != 0 && table.owner != Some(self.nft.portid()) {
            let port = table.owner.map_or_else(|| "unknown".to_owned(), |port| port.to_string());
            let hint = format!("only the process with netlink port {port} may change it");
            return Err(CommitError::Foreign { object, hint });
        }
        if table.userdata == self.mark && table.flags == 0 {
            return Ok(Some(Found::Ours));
        }
        if table.comment().is_some_and(|comment| comment.starts_with(MAKER)) {
            return Ok(Some(Found::Older));
        }
        if self.config.takeover {
            return Ok(Some(Found::Foreign));
        }
        let hint =
            "somebody else made it; remove it, choose another name, or set takeover".to_owned();
        Err(CommitError::Foreign { object, hint })
    }

    /// Encodes and sends operations, cut where the socket does not take them at once.
    async fn send(&mut self, family: Family, ops: &[Op]) -> Result<(), CommitError> {
        let removed: Vec<_> = ops
            .iter()
            .filter(|op| matches!(op, Op::Del(Key { object: Object::Pick(_), .. }, _)))
            .map(|op| op.key().clone())
            .collect();
        let handles = self.reader(family).handles(&removed).await.map_err(read_error)?;
        if handles.len() < removed.len() {
            return Err(CommitError::Unknown {
                doing: "removing a rule that somebody else removed",
                source: std::io::ErrorKind::NotFound.into(),
            });
        }
        let limit = self.nft.max_batch_bytes();
        let fresh = std::mem::take(self.fresh.of_mut(family));
        let mut rest = vec![ops];
        let mut sent_some = false;
        while let Some(part) = rest.pop() {
            let tx = self.batch(family, &handles, false).encode(part);
            if tx.len_bytes() > limit && part.len() > 1 {
                let (head, tail) = part.split_at(part.len() / 2);
                rest.extend([tail, head]);
                continue;
            }
            trace!(%family, ops = part.len(), bytes = tx.len_bytes(), "committing");
            let outcome = match self.nft.commit(&tx).await {
                // One element a message tells which it was.
                Err(NftError::Refused(_)) => {
                    let tx = self.batch(family, &handles, true).encode(part);
                    self.nft.commit(&tx).await
                }
                other => other,
            };
            match outcome {
                Ok(_) => sent_some = true,
                Err(error) if sent_some => return Err(half_way(error)),
                Err(error) => {
                    let error = commit_error(error, part);
                    if error.kind() == ErrorKind::Conflict && !fresh {
                        return Err(CommitError::Unknown {
                            doing: "a transaction on objects that somebody else changed",
                            source: std::io::ErrorKind::NotFound.into(),
                        });
                    }
                    *self.fresh.of_mut(family) = fresh;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    const fn batch<'a>(&'a self, family: Family, handles: &'a Handles, careful: bool) -> Batch<'a> {
        Batch {
            table: self.config.table.as_str(),
            mark: self.mark.as_slice(),
            family,
            handles,
            careful,
        }
    }

    const fn reader(&mut self, family: Family) -> Reader<'_> {
        Reader { table: self.config.table.as_str(), nft: &mut self.nft, family }
    }

    /// Forgets the clients of endpoints that left a pool.
    ///
    /// A client that comes between the commit and this may still be sent to such an endpoint, as if
    /// it had come a moment earlier. Rules do not remember it: the endpoint is no member any more.
    async fn forget_clients(&mut self, family: Family, ops: &[Op]) -> Result<(), NftError> {
        for pool in POOLS {
            let gone = gone_members(pool, ops);
            let map_goes = ops.iter().any(|op| {
                matches!(op, Op::Del(Key { object: Object::Set(SetName::Affinity(it)), .. }, _) if *it == pool)
            });
            if gone.is_empty() || map_goes {
                continue;
            }
            let name = SetName::Affinity(pool).to_string();
            for attempt in 1..=ATTEMPTS {
                let is_gone =
                    |to: Option<(PortId, IpAddr)>| to.is_some_and(|to| gone.contains(&to));
                let stale = self.reader(family).stale(pool, is_gone).await?;
                let limit = self.nft.max_batch_bytes() / OP_BYTES;
                let mut outcome = Ok(());
                for part in stale.chunks(limit.max(1)) {
                    let mut tx = Transaction::new();
                    let elements = part.iter().map(|key| NftElement::new(key));
                    tx.del_elements(nft_family(family), &self.config.table, &name, elements);
                    outcome = outcome.and(self.nft.commit(&tx).await.map(drop));
                }
                match outcome {
                    Ok(()) => break,
                    // One of them expired meanwhile.
                    Err(NftError::Refused(_)) if attempt < ATTEMPTS => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    async fn wipe_family(&mut self, family: Family) -> Result<(), CommitError> {
        let found = match self.table(family).await {
            Ok(found) => found,
            // A kernel without the family has nothing of ours; somebody else's table stays.
            Err(CommitError::Foreign { .. }) => None,
            Err(error) if error.kind() == ErrorKind::Unsupported => None,
            Err(error) => return Err(error),
        };
        if !matches!(found, Some(Found::Older | Found::Ours)) {
            return Ok(());
        }
        debug!(%family, table = self.config.table, "removing");
        let mut tx = Transaction::new();
        tx.del_table(nft_family(family), &self.config.table);
        self.nft.commit(&tx).await.map(drop).map_err(read_error)
    }
}

/// A table of our name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Found {
    /// Somebody else's, to be taken over.
    Foreign,
    /// Made by another version.
    Older,
    Ours,
}

/// What our tables carry: a comment that `nft` lists.
// A type (0), a length and the text with its NUL, as libnftnl 1.2.4 has it.
pub(crate) fn mark() -> Vec<u8> {
    let mut mark = vec![0, u8::try_from(LAYOUT.len() + 1).unwrap_or(u8::MAX)];
    mark.extend_from_slice(LAYOUT.as_bytes());
    mark.push(0);
    mark
}

/// Members of a pool that go, and do not come back in the same operations.
fn gone_members(pool: Pool, ops: &[Op]) -> BTreeSet<(PortId, IpAddr)> {
    let member = |op: &Op| {
        let Object::Element(Element::Member { pool: other, id, ip }) = &op.key().object else {
            return None;
        };
        (*other == pool).then_some((*id, *ip))
    };
    ops.iter().filter(|op| matches!(op, Op::Del(..))).filter_map(member).collect()
}

#[async_trait]
impl Dataplane<Nftables> for NftablesDataplane {
    /// One transaction: all operations take effect together. Only where the socket's buffer is too
    /// small for that (see [`batch_limit`](Self::batch_limit)) it may be several, and an error after
    /// the first is [`CommitError::Unknown`].
    async fn commit(&mut self, family: Family, ops: &[Op]) -> Result<(), CommitError> {
        if ops.len() > MOST_NOTIFIED {
            self.foreign.pause();
        }
        self.send(family, ops).await?;
        if let Err(error) = self.forget_clients(family, ops).await {
            // The next audit finds them.
            debug!(%family, %error, "clients of endpoints that are gone may be remembered");
        }
        Ok(())
    }

    async fn dump(&mut self, family: Family) -> Result<BTreeMap<Key, Value>, CommitError> {
        let table = Key::new(family, Object::Table);
        let other = Value(Content::Odd("of another version".into()));
        let found = match self.table(family).await? {
            None => BTreeMap::new(),
            Some(Found::Foreign | Found::Older) => [(table, other)].into(),
            Some(Found::Ours) => {
                let read = self.reader(family).read().await.map_err(read_error)?;
                match read {
                    Some(mut found) => {
                        found.insert(table, Value::EXISTS);
                        found
                    }
                    None => [(table, other)].into(),
                }
            }
        };
        *self.fresh.of_mut(family) = true;
        debug!(%family, objects = found.len(), "read back");
        Ok(found)
    }

    async fn wipe(&mut self) -> Result<(), CommitError> {
        let mut errors = Vec::new();
        for family in Family::ALL {
            if let Err(error) = self.wipe_family(family).await {
                errors.push((family, error));
            }
        }
        spi::combine(errors)
    }

    async fn forget_flows(
        &mut self,
        family: Family,
        filters: &[FlowFilter],
    ) -> Result<Forgotten, CommitError> {
        spi::forget_flows(&mut self.conntrack, family, filters, spi::translated_to).await
    }

    async fn read_counters(&mut self, family: Family) -> Result<BTreeMap<Key, Count>, CommitError> {
        self.reader(family).counters().await.map_err(read_error)
    }

    async fn foreign_change(&mut self) {
        let Self { foreign, config, .. } = self;
        let families = Family::ALL.map(nft_family);
        foreign.next(|it| it.table == config.table && families.contains(&it.family)).await;
    }

    fn batch_limit(&self) -> usize {
        (self.nft.max_batch_bytes() / OP_BYTES).clamp(1, BATCH_OPS)
    }
}

impl fmt::Debug for NftablesDataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NftablesDataplane").field("config", &self.config).finish_non_exhaustive()
    }
}
