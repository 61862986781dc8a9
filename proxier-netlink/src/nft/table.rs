//! Tables.

use super::attr::*;
use super::types::{Family, MessageKind};
use super::udata;
use crate::batch::{NLM_F_CREATE, NLM_F_EXCL, Transaction};
use crate::dec::{Attrs, Message};

/// A table to make or change.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct TableSpec<'a> {
    family: Family,
    name: &'a str,
    flags: u32,
    userdata: Option<&'a [u8]>,
    exclusive: bool,
}

impl<'a> TableSpec<'a> {
    /// A table without flags.
    pub const fn new(family: Family, name: &'a str) -> Self {
        Self { family, name, flags: 0, userdata: None, exclusive: false }
    }

    /// Its base chains see no packets. Making the table again without this wakes it up.
    pub const fn dormant(mut self) -> Self {
        self.flags |= TableDump::DORMANT;
        self
    }

    /// Only the socket that makes it can change it, and it disappears with that socket.
    // KERNEL: since 5.12; others get EPERM (net/netfilter/nf_tables_api.c, v6.12).
    pub const fn owner(mut self) -> Self {
        self.flags |= TableDump::OWNER;
        self
    }

    /// Keeps bytes of the caller's with it, at most 256.
    pub const fn userdata(mut self, userdata: &'a [u8]) -> Self {
        self.userdata = Some(userdata);
        self
    }

    /// Makes the commit fail with EEXIST if the table exists.
    pub const fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }
}

impl Transaction {
    /// Makes a table if it does not exist.
    pub fn new_table(&mut self, family: Family, name: &str) {
        self.table(TableSpec::new(family, name));
    }

    /// Makes a table if it does not exist, and sets its flags if it does.
    pub fn table(&mut self, spec: TableSpec<'_>) {
        let exclusive = if spec.exclusive { NLM_F_EXCL } else { 0 };
        let message = self.begin(MessageKind::NEWTABLE, NLM_F_CREATE | exclusive, spec.family);
        let w = self.writer();
        w.str(TABLE_NAME, spec.name);
        w.be32(TABLE_FLAGS, spec.flags);
        if let Some(userdata) = spec.userdata {
            w.bytes(TABLE_USERDATA, userdata);
        }
        self.end(message);
    }

    /// Deletes a table with all it holds; ENOENT if it does not exist.
    pub fn del_table(&mut self, family: Family, name: &str) {
        let message = self.begin(MessageKind::DELTABLE, 0, family);
        self.writer().str(TABLE_NAME, name);
        self.end(message);
    }

    /// Deletes a table with all it holds if it exists: makes it, then deletes it.
    pub fn destroy_table(&mut self, family: Family, name: &str) {
        self.new_table(family, name);
        self.del_table(family, name);
    }
}

/// A table as the kernel lists it.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct TableDump {
    /// Its family.
    pub family: Family,
    /// Its name.
    pub name: String,
    /// Its handle.
    pub handle: u64,
    /// [`TableDump::DORMANT`], [`TableDump::OWNER`].
    pub flags: u32,
    /// Chains, sets and other objects in it.
    pub uses: u32,
    /// The port id of the socket that owns it.
    pub owner: Option<u32>,
    /// The caller's bytes.
    pub userdata: Vec<u8>,
}

impl TableDump {
    /// Flag: its base chains see no packets.
    pub const DORMANT: u32 = 1;
    /// Flag: it belongs to a socket.
    pub const OWNER: u32 = 2;

    /// The text of the comment, if the bytes hold one.
    pub fn comment(&self) -> Option<&str> {
        udata::comment(&self.userdata, udata::COMMENT)
    }

    pub(crate) fn read(message: Message<'_>) -> Option<Self> {
        let (family, attrs) = message.nfnl()?;
        let t = Attrs::table::<8>(attrs);
        Some(Self {
            family: Family::from_number(family),
            name: t.str(TABLE_NAME)?.into_owned(),
            handle: t.be64(TABLE_HANDLE).unwrap_or_default(),
            flags: t.be32(TABLE_FLAGS).unwrap_or_default(),
            uses: t.be32(TABLE_USE).unwrap_or_default(),
            owner: t.be32(TABLE_OWNER),
            userdata: t.raw(TABLE_USERDATA).unwrap_or_default().to_vec(),
        })
    }
}
