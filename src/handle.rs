//! What the rest of a program holds of a driver.

use proxier_core::{
    Proxier,
    model::{Event, Store},
};
use tokio::sync::{mpsc, oneshot, watch};

use crate::driver::Standing;
use crate::swap::{Swap, SwapError, Swapped};

/// How many events may wait. A source that is faster waits; nothing is lost.
const QUEUE: usize = 1024;

/// Feeds a [`Driver`](crate::Driver) and watches it. Cheap to clone; the driver stops when the last one
/// is gone.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    standing: watch::Receiver<Standing>,
}

pub(crate) type Look = Box<dyn FnOnce(&Store, &dyn Proxier) + Send>;

/// What a handle asks of the driver.
pub(crate) enum Command {
    Audit(oneshot::Sender<Standing>),
    Event(Event),
    Inspect(Look),
    Settle(oneshot::Sender<Standing>),
    Swap(Box<dyn Proxier>, Swap, oneshot::Sender<Result<Swapped, SwapError>>),
}

/// The driver is gone.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the driver has stopped")]
pub struct Stopped;

impl Handle {
    /// A handle, and where the driver finds what it is asked.
    pub(crate) fn new(standing: watch::Receiver<Standing>) -> (Self, mpsc::Receiver<Command>) {
        let (commands, asked) = mpsc::channel(QUEUE);
        (Self { commands, standing }, asked)
    }

    /// Passes an event on. Waits while too many are queued.
    ///
    /// # Errors
    /// The driver has stopped.
    ///
    /// # Cancel safety
    /// Either the event was passed on or it was not.
    pub async fn send(&self, event: Event) -> Result<(), Stopped> {
        self.commands.send(Command::Event(event)).await.map_err(|_gone| Stopped)
    }

    /// Waits until everything sent so far has been synced, successfully or not, and says how it went.
    ///
    /// # Errors
    /// The driver has stopped.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub async fn settle(&self) -> Result<Standing, Stopped> {
        self.ask(Command::Settle).await
    }

    /// Reads the kernel back, repairs what others changed, and says how it went.
    ///
    /// # Errors
    /// The driver has stopped.
    ///
    /// # Cancel safety
    /// Safe to drop; the audit happens all the same.
    pub async fn audit(&self) -> Result<Standing, Stopped> {
        self.ask(Command::Audit).await
    }

    /// Goes over to another mode while traffic flows.
    ///
    /// The new proxier is programmed beside the old one, then takes over once the kernel holds all of
    /// it, and the old one is removed. Translation is decided once for a connection and remembered by
    /// the kernel, so established connections go on as they are, and new ones are served by one mode
    /// or the other at every moment. The exception are connections that the old mode carries itself,
    /// see [`Swap::linger`].
    ///
    /// # Errors
    /// The new mode cannot take over. It is removed again, and the old one stays in force.
    ///
    /// # Cancel safety
    /// The exchange happens all the same once it was asked for.
    pub async fn swap(&self, to: Box<dyn Proxier>, options: Swap) -> Result<Swapped, SwapError> {
        let (sender, receiver) = oneshot::channel();
        let command = Command::Swap(to, options, sender);
        self.commands.send(command).await.map_err(|_gone| Stopped)?;
        receiver.await.map_err(|_gone| Stopped)?
    }

    /// Looks at what is wanted and at the proxier, between two syncs, within the driver's own task:
    /// for displays and debugging. Events that are not yet synced may be in the store already, but
    /// not in its fragments.
    ///
    /// # Errors
    /// The driver has stopped.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub async fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Store, &dyn Proxier) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (sender, receiver) = oneshot::channel();
        let look: Look = Box::new(move |store, proxier| {
            // Whoever asked may have lost interest.
            sender.send(look(store, proxier)).ok();
        });
        self.commands.send(Command::Inspect(look)).await.map_err(|_gone| Stopped)?;
        receiver.await.map_err(|_gone| Stopped)
    }

    /// Where the driver stands, now and as it changes.
    #[must_use]
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    async fn ask(
        &self,
        command: impl FnOnce(oneshot::Sender<Standing>) -> Command,
    ) -> Result<Standing, Stopped> {
        let (sender, receiver) = oneshot::channel();
        self.commands.send(command(sender)).await.map_err(|_gone| Stopped)?;
        receiver.await.map_err(|_gone| Stopped)
    }
}
