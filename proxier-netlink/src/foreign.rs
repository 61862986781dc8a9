//! Waiting for somebody else to change what one has programmed.

use crate::netns::NetNs;
use crate::nfnl_listen::{Change, Event, Events};
use crate::nft::MessageKind;

/// Tells when somebody else changed objects of nf_tables.
///
/// Subscribes when it is first waited for: who never waits pays nothing, and the kernel makes no
/// notifications of what is written before. Between a [`pause`](Self::pause) and the next wait
/// nothing is noticed.
#[derive(Debug)]
pub struct ForeignChanges {
    netns: NetNs,
    /// The socket whose changes are one's own.
    portid: u32,
    events: Option<Events>,
    /// There was a change of ours in the commit that is being read.
    dirty: bool,
}

impl ForeignChanges {
    /// Waits in a namespace, for anybody but the socket with this port id.
    #[must_use]
    pub const fn new(netns: NetNs, portid: u32) -> Self {
        Self { netns, portid, events: None, dirty: false }
    }

    /// Ends the subscription until somebody waits again: before writing so much that the
    /// notifications of it would be lost, or slow it down.
    pub fn pause(&mut self) {
        self.events = None;
        self.dirty = false;
    }

    /// Resolves once per commit that changed something `is_ours`, or when notifications were lost.
    /// Never, if there can be no subscription.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no change is lost.
    pub async fn next(&mut self, is_ours: impl Fn(&Change) -> bool) {
        loop {
            if self.events.is_none() {
                let Ok(mut events) = Events::open(&self.netns) else {
                    return std::future::pending().await;
                };
                events.ignore(self.portid);
                self.events = Some(events);
            }
            let Some(events) = &mut self.events else { continue };
            match events.next().await {
                Ok(Event::Change(change)) if change.kind == MessageKind::NEWGEN => {
                    if std::mem::take(&mut self.dirty) {
                        return;
                    }
                }
                Ok(Event::Change(change)) => self.dirty |= is_ours(&change),
                Ok(Event::Lost) => {
                    self.dirty = false;
                    return;
                }
                Err(_) => {
                    self.pause();
                    return;
                }
            }
        }
    }
}
