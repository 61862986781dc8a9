//! What a notification is about.

use std::borrow::Cow;

use super::attr::*;
use super::types::{Generation, MessageKind};
use crate::dec::Attrs;

/// The attributes of a notification a reader cares for.
#[derive(Debug, Default)]
pub(crate) struct EventAttrs {
    pub(crate) table: String,
    pub(crate) chain: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) handle: Option<u64>,
    pub(crate) generation: Option<Generation>,
    pub(crate) thread: Option<(u32, String)>,
}

/// Reads them; what is missing is empty.
pub(crate) fn event_attrs(kind: MessageKind, attrs: Attrs<'_>) -> EventAttrs {
    let t = attrs.table::<4>();
    let text = |kind| t.str(kind).map(Cow::into_owned);
    // In all kinds but NEWGEN the first attribute is the name of the table.
    let table = text(TABLE_NAME).unwrap_or_default();
    match kind {
        MessageKind::NEWGEN => EventAttrs {
            generation: t.be32(GEN_ID).map(Generation),
            thread: t.be32(GEN_PROC_PID).zip(text(GEN_PROC_NAME)),
            ..EventAttrs::default()
        },
        MessageKind::NEWCHAIN | MessageKind::DELCHAIN => {
            EventAttrs { table, chain: text(CHAIN_NAME), ..EventAttrs::default() }
        }
        MessageKind::NEWRULE | MessageKind::DELRULE => EventAttrs {
            table,
            chain: text(RULE_CHAIN),
            handle: t.be64(RULE_HANDLE),
            ..EventAttrs::default()
        },
        MessageKind::NEWTABLE | MessageKind::DELTABLE => {
            EventAttrs { table, ..EventAttrs::default() }
        }
        // Sets, elements, objects and flow tables: the name is the second attribute.
        _ => EventAttrs { table, name: text(SET_NAME), ..EventAttrs::default() },
    }
}
