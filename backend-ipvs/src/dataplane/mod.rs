//! The I/O half of the mode.

mod drain;
mod read;
mod servers;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use proxier_core::{
    Count, Family,
    conntrack::{FlowFilter, Forgotten},
    spi::{CommitError, Dataplane},
};
use proxier_netlink::{
    NetNs,
    ct::Conntrack,
    dummy::{AddressRefusal, LinkError, Links},
    gate,
    ipvs::{Batch as IpvsBatch, Ipvs as IpvsSocket, Refusal, ServiceEntry, Stats},
    nft::{NftError, NftSocket},
    spi::{answered_by, combine, forget_flows, kind, read_error, refused},
};
use tracing::{debug, trace};

use self::{
    drain::Draining,
    servers::{dest, failed, lost, server, server_id, service, virtual_server},
};
use crate::{
    EngineError,
    backend::{Ipvs, Op},
    config::Config,
    mark,
    object::{Item, Key, Phase, ServerId, SetName, Value, part},
};

/// Operations sent at once where the socket takes large batches.
const BATCH_OPS: usize = 4096;
/// Bytes of an operation, about; for small sockets.
const OP_BYTES: usize = 512;

/// The I/O half of the IPVS mode.
pub struct IpvsDataplane {
    config: Config,
    ipvs: IpvsSocket,
    nft: NftSocket,
    links: Links,
    conntrack: Conntrack,
    /// The addresses that other links have, as last read.
    elsewhere: BTreeSet<IpAddr>,
    /// Our virtual servers at such addresses, which nothing else than the table tells from others.
    anyway: BTreeSet<ServerId>,
    draining: Draining,
}

impl IpvsDataplane {
    /// Opens the sockets, in a network namespace. Changes nothing.
    ///
    /// # Errors
    /// A setting is out of range, the namespace cannot be entered, the kernel has no IPVS, or a
    /// privilege is missing.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub async fn open(config: &Config, netns: &NetNs) -> Result<Self, EngineError> {
        config.validate()?;
        Ok(Self {
            config: config.clone(),
            ipvs: IpvsSocket::open(netns).await?,
            nft: NftSocket::open(netns)?,
            links: Links::open(netns)?,
            conntrack: Conntrack::open(netns)?,
            elsewhere: BTreeSet::new(),
            anyway: BTreeSet::new(),
            draining: Draining::default(),
        })
    }

    /// Destinations that get no new connections and are kept for those they have.
    pub fn draining(&self) -> impl Iterator<Item = (ServerId, SocketAddr)> {
        self.draining.iter()
    }

    /// Remembers a virtual server that only the table would tell.
    fn note(&mut self, id: ServerId) {
        if matches!(id, ServerId::Frontend { ip, .. } if self.elsewhere.contains(&ip)) {
            self.anyway.insert(id);
        }
    }

    /// Makes and changes virtual servers and destinations.
    fn serve(&mut self, ops: &[Op]) -> (IpvsBatch, Vec<(ServerId, SocketAddr)>) {
        let mut batch = IpvsBatch::new();
        let mut back = Vec::new();
        for (index, op) in (0..).zip(ops) {
            batch.op(index);
            match op {
                Op::Add(Key::Server(id), Value::Server(new)) => {
                    self.note(*id);
                    batch.new_service(&service(*id, new));
                }
                Op::Set { key: Key::Server(id), new: Value::Server(new), .. } => {
                    batch.set_service(&service(*id, new));
                }
                Op::Add(Key::Destination(id, to), Value::Weight(weight)) => {
                    let (key, new) = (virtual_server(*id), dest(*to, *weight));
                    if self.draining.has(*id, *to) {
                        batch.set_dest(key, &new);
                        back.push((*id, *to));
                    } else {
                        batch.new_dest(key, &new);
                    }
                }
                Op::Set { key: Key::Destination(id, to), new: Value::Weight(weight), .. } => {
                    batch.set_dest(virtual_server(*id), &dest(*to, *weight));
                }
                Op::Add(..) | Op::Set { .. } | Op::Del(..) => {}
            }
        }
        (batch, back)
    }

    /// Removes virtual servers and destinations; these only once nobody is connected to them.
    fn dismiss(&mut self, ops: &[Op]) -> (IpvsBatch, BTreeMap<ServerId, Vec<SocketAddr>>) {
        let mut batch = IpvsBatch::new();
        let mut going: BTreeMap<ServerId, Vec<SocketAddr>> = BTreeMap::new();
        let mut gone = BTreeSet::new();
        for (index, op) in (0..).zip(ops) {
            match op {
                Op::Del(Key::Server(id), _) => {
                    batch.op(index);
                    batch.del_service(virtual_server(*id));
                    self.anyway.remove(id);
                    gone.insert(*id);
                }
                Op::Del(Key::Destination(id, to), _) => going.entry(*id).or_default().push(*to),
                Op::Del(..) | Op::Add(..) | Op::Set { .. } => {}
            }
        }
        going.retain(|id, _| !gone.contains(id));
        for id in gone {
            self.draining.forget_server(id);
        }
        (batch, going)
    }

    /// Returns the first refusal that matters.
    async fn execute(&mut self, batch: &IpvsBatch) -> Result<Option<Refusal>, CommitError> {
        if batch.is_empty() {
            return Ok(None);
        }
        let refusals = self.ipvs.commit(batch).await.map_err(lost)?;
        Ok(refusals.into_iter().find(|refusal| !refusal.is_already_gone()))
    }

    /// Carries out the operations of a phase: all of them or none.
    async fn filter(
        &mut self,
        family: Family,
        ops: &[Op],
        phase: Phase,
    ) -> Result<(), CommitError> {
        let now = (0..).zip(ops).filter(|(_, op)| Phase::of(op) == Some(phase));
        let now: Vec<_> = now.collect();
        if now.is_empty() {
            return Ok(());
        }
        let Ok(tx) = gate::encode(family, &self.config.table, now, part) else {
            let destroyed = gate::destroy(&mut self.nft, family, &self.config.table).await;
            destroyed.map_err(read_error)?;
            return Err(CommitError::Unknown {
                doing: "making a table of another version anew",
                source: io::ErrorKind::Interrupted.into(),
            });
        };
        trace!(%family, ops = ops.len(), bytes = tx.len_bytes(), "committing");
        match self.nft.commit(&tx).await {
            Ok(_) => Ok(()),
            Err(NftError::Refused(refusal))
                if kind(refusal.kind()) == proxier_core::spi::ErrorKind::Conflict =>
            {
                Err(CommitError::Unknown {
                    doing: "a transaction on objects that somebody else changed",
                    source: io::Error::from_raw_os_error(refusal.errno()),
                })
            }
            Err(NftError::Refused(refusal)) => Err(refused(&refusal, ops)),
            Err(error) => {
                Err(CommitError::Unknown { doing: "a transaction", source: error.into_io_error() })
            }
        }
    }

    /// The addresses that operations add, or remove.
    fn changed(&self, ops: &[Op], add: bool) -> Vec<IpAddr> {
        let address = |op: &Op| match op {
            Op::Add(Key::Address(ip), _) if add => Some(*ip),
            Op::Del(Key::Address(ip), _) if !add => Some(*ip),
            Op::Add(..) | Op::Set { .. } | Op::Del(..) => None,
        };
        ops.iter().filter_map(address).filter(|ip| !self.elsewhere.contains(ip)).collect()
    }

    /// Makes the link, and adds addresses to it.
    async fn bind(
        &mut self,
        addresses: Vec<IpAddr>,
    ) -> Result<Option<AddressRefusal>, CommitError> {
        let dummy = self.links.ensure_dummy(&self.config.link, true).await.map_err(unlinked)?;
        let refusals = self.links.add_addresses(dummy.index, &addresses).await;
        Ok(refusals.into_iter().next())
    }

    async fn unbind(
        &mut self,
        addresses: Vec<IpAddr>,
    ) -> Result<Option<AddressRefusal>, CommitError> {
        let found = self.links.find_dummy(&self.config.link).await.map_err(unlinked)?;
        let Some(index) = found else { return Ok(None) };
        let refusals = self.links.remove_addresses(index, &addresses).await;
        Ok(refusals.into_iter().next())
    }

    /// The kernel's virtual servers that are ours, of a family.
    async fn servers(
        &mut self,
        family: Family,
        known: &BTreeMap<Key, Value>,
        bound: &BTreeSet<IpAddr>,
    ) -> Result<Vec<(ServerId, ServiceEntry)>, CommitError> {
        let all = self.ipvs.services().await.map_err(failed)?;
        let is_ours = |id: &ServerId| match *id {
            ServerId::Mark(of, mark) => of == family && mark::is_ours(self.config.mark_base, mark),
            ServerId::Frontend { ip, port, protocol } => {
                let way_in = proxier_core::ir::WayIn::Address(ip);
                let key = proxier_core::ir::FrontendKey { way_in, port, protocol };
                let claim = Key::Element(SetName::Servers, Item::Frontend(key));
                let known = known.contains_key(&claim) || self.anyway.contains(id);
                let excluded = self.config.exclude.iter().any(|net| net.contains(&ip));
                family.has(&ip) && !excluded && (bound.contains(&ip) || known)
            }
        };
        let ours = all.into_iter().filter_map(|it| Some((server_id(it.service.key)?, it)));
        Ok(ours.filter(|(id, _)| is_ours(id)).collect())
    }

    /// The index of our link and the addresses on it; notes those of others.
    async fn addresses(&mut self) -> Result<BTreeSet<IpAddr>, CommitError> {
        let link = self.links.find_dummy(&self.config.link).await.map_err(unlinked)?;
        let all = self.links.addresses().await.map_err(unlinked)?;
        let (ours, others): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|it| Some(it.index) == link);
        self.elsewhere = others.into_iter().map(|it| it.address).collect();
        let whole = |ip: IpAddr| if ip.is_ipv4() { 32 } else { 128 };
        let ours = ours.into_iter().filter(|it| it.prefix_len == whole(it.address));
        Ok(ours.map(|it| it.address).collect())
    }

    async fn wipe_family(&mut self, family: Family) -> Result<(), CommitError> {
        let known = match read::read(&mut self.nft, family, &self.config.table).await {
            // A kernel without the family has nothing of ours.
            Err(NftError::Unsupported { .. }) => BTreeMap::new(),
            other => other.map_err(read_error)?,
        };
        let bound = self.addresses().await?;
        let mut batch = IpvsBatch::new();
        for (id, _) in self.servers(family, &known, &bound).await? {
            batch.del_service(virtual_server(id));
        }
        if let Some(refusal) = self.execute(&batch).await? {
            return Err(servers::refused(&refusal, &[]));
        }
        // It says which virtual servers are ours, so it goes after them.
        if known.contains_key(&Key::Table(family)) {
            let destroyed = gate::destroy(&mut self.nft, family, &self.config.table).await;
            destroyed.map_err(read_error)?;
        }
        Ok(())
    }
}

/// What the kernel counted.
fn count(stats: &Stats) -> Count {
    Count {
        connections: Some(stats.connections),
        packets: Some(stats.in_packets.saturating_add(stats.out_packets)),
        bytes: Some(stats.in_bytes.saturating_add(stats.out_bytes)),
    }
}

fn unlinked(error: LinkError) -> CommitError {
    let kind = kind(error.kind());
    CommitError::Transport { doing: error.to_string(), source: io::Error::other(error), kind }
}

fn unbound(refusal: AddressRefusal, ops: &[Op]) -> CommitError {
    let op = ops.iter().position(|op| *op.key() == Key::Address(refusal.address));
    CommitError::Refused {
        op,
        object: Key::Address(refusal.address).to_string(),
        extack: String::new(),
        kind: kind(refusal.kind()),
        errno: refusal.errno,
    }
}

#[async_trait]
impl Dataplane<Ipvs> for IpvsDataplane {
    /// Not atomic: what traffic is led to comes first and goes last.
    async fn commit(&mut self, family: Family, ops: &[Op]) -> Result<(), CommitError> {
        self.filter(family, ops, Phase::Claim).await?;
        let (batch, back) = self.serve(ops);
        if let Some(refusal) = self.execute(&batch).await? {
            return Err(servers::refused(&refusal, ops));
        }
        back.into_iter().for_each(|(id, to)| self.draining.forget(id, to));
        self.filter(family, ops, Phase::Lead).await?;
        let (new, old) = (self.changed(ops, true), self.changed(ops, false));
        let link = ops.iter().any(|op| matches!(op, Op::Add(Key::Link(_), _)));
        let mut refusal = None;
        if link || !new.is_empty() {
            refusal = self.bind(new).await?;
        }
        if refusal.is_none() && !old.is_empty() {
            refusal = self.unbind(old).await?;
        }
        if let Some(refusal) = refusal {
            return Err(unbound(refusal, ops));
        }
        let (mut batch, going) = self.dismiss(ops);
        self.drain(&mut batch, going).await?;
        if let Some(refusal) = self.execute(&batch).await? {
            return Err(servers::refused(&refusal, ops));
        }
        self.filter(family, ops, Phase::Release).await
    }

    async fn dump(&mut self, family: Family) -> Result<BTreeMap<Key, Value>, CommitError> {
        let read = read::read(&mut self.nft, family, &self.config.table).await;
        let mut found = read.map_err(read_error)?;
        if self.links.find_dummy(&self.config.link).await.map_err(unlinked)?.is_some() {
            found.insert(Key::Link(family), Value::Exists);
        }
        let bound = self.addresses().await?;
        for (id, entry) in self.servers(family, &found, &bound).await? {
            self.note(id);
            found.insert(Key::Server(id), Value::Server(server(&entry)));
            for it in self.ipvs.dests(virtual_server(id)).await.map_err(failed)? {
                let to = SocketAddr::new(it.dest.address, it.dest.port);
                if it.dest.weight == 0 {
                    self.draining.note(id, to, Instant::now());
                } else {
                    found.insert(Key::Destination(id, to), Value::Weight(it.dest.weight));
                }
            }
        }
        // What the node has anyway is as good as ours.
        let anyway = self.elsewhere.iter().filter(|ip| {
            found.contains_key(&Key::Element(SetName::Addresses, Item::Address(**ip)))
        });
        let addresses = anyway.copied().chain(bound).filter(|ip| family.has(ip));
        let addresses: Vec<_> = addresses.map(|ip| (Key::Address(ip), Value::Exists)).collect();
        found.extend(addresses);
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
        self.draining = Draining::default();
        self.anyway.clear();
        combine(errors)?;
        self.links.delete_dummy(&self.config.link).await.map_err(unlinked)?;
        Ok(())
    }

    async fn forget_flows(
        &mut self,
        family: Family,
        filters: &[FlowFilter],
    ) -> Result<Forgotten, CommitError> {
        forget_flows(&mut self.conntrack, family, filters, answered_by).await
    }

    async fn read_counters(&mut self, family: Family) -> Result<BTreeMap<Key, Count>, CommitError> {
        let mut found = BTreeMap::new();
        for entry in self.ipvs.services().await.map_err(failed)? {
            let Some(id) = server_id(entry.service.key).filter(|id| id.family() == family) else {
                continue;
            };
            found.insert(Key::Server(id), count(&entry.stats));
            for it in self.ipvs.dests(virtual_server(id)).await.map_err(failed)? {
                let to = SocketAddr::new(it.dest.address, it.dest.port);
                found.insert(Key::Destination(id, to), count(&it.stats));
            }
        }
        Ok(found)
    }

    async fn tick(&mut self, now: Instant) -> Result<Option<Duration>, CommitError> {
        self.settle(now).await
    }

    fn batch_limit(&self) -> usize {
        (self.nft.max_batch_bytes() / OP_BYTES).clamp(1, BATCH_OPS)
    }
}

impl fmt::Debug for IpvsDataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IpvsDataplane").field("draining", &self.draining).finish_non_exhaustive()
    }
}
