//! Follows one kind: list, watch, and what to do when either fails.
//!
//! A state machine of two states. *Listing* asks for everything, by a streaming list where the server
//! has them, in pages otherwise, and leads to *watching* from the version of the list. A watch that
//! ends is resumed from the last version seen; only an expired version leads back to listing. Every
//! failure waits, longer each time.
//!
//! `kube`'s own watcher keeps bookmarks to itself, so nobody could tell a quiet cluster from a dead
//! connection; it fails a whole list because of one object, and asks a server that refuses streaming
//! lists for ever. Hence this one, on `kube`'s client.

use std::{collections::BTreeMap, marker::PhantomData, sync::Arc, time::Duration};

use kube::{
    Client,
    api::{ListParams, WatchParams},
    core::Request,
};
use proxier_core::{ObjectName, model::Problem};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use crate::{
    ask::{self, Answer},
    backoff::{Backoff, between},
    gather::{Feed, Message},
    kinds::{Kind, Selection, Watched},
    options::Options,
    status::Reporter,
    trouble::{Asked, Status, Trouble, TroubleKind},
    wire::{self, Head, Line, Page},
};

/// A watch that ends sooner than this without having said anything was no watch.
const SHORT: Duration = Duration::from_secs(1);

/// Follows the objects of one kind for ever.
pub(crate) struct Follower<W> {
    client: Client,
    options: Arc<Options>,
    selection: Selection,
    request: Request,
    report: Reporter,
    out: mpsc::Sender<Message>,
    backoff: Backoff,
    /// What went wrong last, since the last event.
    last: Option<TroubleKind>,
    /// The server has not refused a streaming list yet.
    streaming: bool,
    /// Ask for pages, or for everything at once because a token expired under way.
    paged: bool,
    /// No list may be older than this.
    floor: &'static str,
    buffer: Vec<u8>,
    kind: PhantomData<W>,
}

/// A complete list, and where to go on.
struct Listed<T> {
    found: Found<T>,
    version: String,
    /// A streaming list goes on as a watch.
    watch: Option<Answer>,
}

/// What a list has brought so far.
struct Found<T> {
    items: BTreeMap<ObjectName, T>,
    problems: BTreeMap<ObjectName, Vec<Problem>>,
}

/// How a watch ended.
enum End {
    /// As watches do.
    Closed,
    /// The version is no longer known.
    Expired(Trouble),
    Failed(Trouble),
    /// The server said in the watch that it cannot go on.
    Spoiled(Trouble),
}

impl<W: Watched> Follower<W> {
    pub(crate) fn new(
        client: Client,
        node: &str,
        options: Arc<Options>,
        report: Reporter,
        out: mpsc::Sender<Message>,
    ) -> Self {
        Self {
            client,
            selection: W::selection(node),
            request: Request::new(W::KIND.path()),
            report,
            out,
            backoff: Backoff::new(options.first_retry, options.longest_retry),
            last: None,
            streaming: options.streaming_lists,
            paged: true,
            // Any version will do for a start: the server answers from memory.
            floor: "0",
            buffer: Vec::new(),
            options,
            kind: PhantomData,
        }
    }

    pub(crate) async fn run(mut self) {
        loop {
            match self.list().await {
                Ok(listed) => {
                    self.paged = true;
                    self.report.set_problems(listed.found.problems.into_iter().collect());
                    self.report.complete(listed.found.items.len());
                    self.pass(Feed::List(listed.found.items)).await;
                    self.watch(listed.version, listed.watch).await;
                }
                Err(trouble) => self.wait(trouble).await,
            }
            // A list from memory may be as old as what has just failed.
            self.floor = "";
        }
    }

    async fn pass(&self, feed: Feed<W::Item>) {
        // Whoever listened is about to drop this future too.
        self.out.send(W::message(feed)).await.ok();
    }

    async fn wait(&mut self, trouble: Trouble) {
        let optional = W::KIND == Kind::ServiceCidrs;
        let is_final = matches!(trouble.kind, TroubleKind::Forbidden | TroubleKind::NotServed);
        let last = self.last.replace(trouble.kind);
        // K8S: a server that comes back forbids everything until it has read its roles, and then knows
        // no version of before (seen with kube-apiserver 1.36).
        let silent = matches!(last, Some(TroubleKind::Unreachable | TroubleKind::TimedOut));
        let forbids = matches!(trouble.kind, TroubleKind::Forbidden | TroubleKind::Unauthorized);
        let forgot = trouble.kind == TroubleKind::Expired && last != Some(trouble.kind);
        if forgot || (silent && forbids) {
            self.backoff.reset();
        }
        let mut delay = self.backoff.delay(Instant::now());
        let retry_after = trouble.retry_after;
        if let Some(least) = retry_after.filter(|it| *it > delay) {
            // All clients are told the same.
            delay = between(least, least + delay);
        }
        let answer = self.report.answer();
        self.report.failed(trouble);
        if optional && is_final {
            self.report.unavailable();
            self.pass(Feed::Unavailable).await;
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            // The rest of a long delay would be time lost.
            () = answer, if retry_after.is_none() => {
                let soon = self.options.first_retry.min(delay);
                tokio::time::sleep(between(Duration::ZERO, soon)).await;
            }
        }
    }

    async fn list(&mut self) -> Result<Listed<W::Item>, Trouble> {
        if self.streaming {
            self.report.count(|it| it.lists += 1);
            let trouble = match self.stream().await {
                Ok(listed) => return Ok(listed),
                Err(trouble) => trouble,
            };
            if matches!(trouble.kind, TroubleKind::NotServed | TroubleKind::Refused) {
                // Not in this version, not with this storage, or not at all: never ask again.
                self.streaming = false;
            } else if trouble.kind != TroubleKind::Forbidden {
                // Who may list but not watch gets a list, and hears at the watch what is missing.
                return Err(trouble);
            }
            tracing::debug!(kind = %W::KIND, %trouble, "no streaming list: listing in pages");
        }
        self.report.count(|it| it.lists += 1);
        self.pages().await
    }

    /// A streaming list: a watch that begins with all there is.
    // K8S: KEP-3157.
    async fn stream(&mut self) -> Result<Listed<W::Item>, Trouble> {
        let asked = Asked::of(W::KIND, "watch");
        let mut answer = self.open(self.floor, true).await?;
        let mut found = Found::default();
        let refused = |message: &str| asked.trouble(TroubleKind::Refused, message);
        loop {
            let next = timeout(self.options.stream_patience, answer.line(&mut self.buffer)).await;
            let Ok(line) = next else {
                return Err(refused("the streaming list does not end: not supported?"));
            };
            let Some(text) = line? else {
                return Err(asked.trouble(TroubleKind::Unreachable, "the streaming list broke off"));
            };
            let Some(line) = parse(asked, text)? else { continue };
            match &*line.event {
                // K8S: what changes while the list is under way comes between its objects.
                "ADDED" | "MODIFIED" => found.add::<W>(line.object),
                "DELETED" => found.remove(&Head::read(line.object).object_name()),
                "BOOKMARK" => {
                    let head = Head::read(line.object);
                    if head.ends_initial_events {
                        let (version, watch) = (head.version, Some(answer));
                        return Ok(Listed { found, version, watch });
                    }
                    return Err(refused("no streaming list: a bookmark without the end mark"));
                }
                "ERROR" => {
                    let mut trouble = status(asked, line.object.get());
                    // K8S: a server whose storage cannot do it says so here, as an internal error.
                    if trouble.kind == TroubleKind::Server {
                        trouble.kind = TroubleKind::Refused;
                    }
                    return Err(trouble);
                }
                _ => {}
            }
        }
    }

    /// A list in pages.
    async fn pages(&mut self) -> Result<Listed<W::Item>, Trouble> {
        let asked = Asked::of(W::KIND, "list");
        let mut found = Found::default();
        let mut token = None;
        loop {
            let params = ListParams {
                label_selector: self.selection.labels.map(str::to_owned),
                field_selector: self.selection.fields.clone(),
                limit: self.paged.then_some(self.options.page_size),
                continue_token: token.take(),
                ..ListParams::default()
            };
            let is_first = params.continue_token.is_none();
            let ask = async {
                ask::send(&self.client, asked, self.request.list(&params)).await?.text().await
            };
            let text = match timeout(self.options.request_timeout, ask).await {
                Ok(Err(trouble)) if trouble.kind == TroubleKind::Expired && !is_first => {
                    // Pages that expire faster than they are read would do so for ever.
                    self.paged = false;
                    return Err(trouble);
                }
                Ok(text) => text?,
                Err(_) => return Err(late(asked, self.options.request_timeout)),
            };
            let page: Page<'_> =
                serde_json::from_str(&text).map_err(|error| garbled(asked, "the list", &error))?;
            for object in page.items {
                found.add::<W>(object);
            }
            self.report.heard(|_| ());
            if page.metadata.token.is_empty() {
                let version = page.metadata.resource_version;
                if version.is_empty() {
                    return Err(asked.trouble(TroubleKind::Garbled, "the list has no version"));
                }
                return Ok(Listed { found, version, watch: None });
            }
            token = Some(page.metadata.token);
        }
    }

    /// Watches from `version` on, through any number of connections, until a list is needed.
    async fn watch(&mut self, mut version: String, mut watch: Option<Answer>) {
        let mut spoiled = false;
        loop {
            let answer = match watch.take() {
                Some(answer) => Ok(answer),
                None => self.open(&version, false).await,
            };
            let end = match answer {
                Ok(answer) => self.drain(answer, &mut version).await,
                Err(trouble) if trouble.kind == TroubleKind::Expired => End::Expired(trouble),
                Err(trouble) => End::Failed(trouble),
            };
            match end {
                End::Closed => spoiled = false,
                End::Expired(trouble) => return self.wait(trouble).await,
                End::Failed(trouble) => {
                    // Asked again from here, the server would say the same.
                    let list = matches!(trouble.kind, TroubleKind::Garbled | TroubleKind::Refused);
                    self.wait(trouble).await;
                    if list {
                        return;
                    }
                }
                End::Spoiled(trouble) => {
                    self.wait(trouble).await;
                    if std::mem::replace(&mut spoiled, true) {
                        return;
                    }
                }
            }
        }
    }

    async fn open(&self, version: &str, initial: bool) -> Result<Answer, Trouble> {
        let asked = Asked::of(W::KIND, "watch");
        self.report.count(|it| it.watches += 1);
        // Not all at once: every node of a cluster has four of these.
        let lifetime = between(self.options.watch_lifetime / 5 * 4, self.options.watch_lifetime);
        let params = WatchParams {
            label_selector: self.selection.labels.map(str::to_owned),
            field_selector: self.selection.fields.clone(),
            timeout: u32::try_from(lifetime.as_secs().max(1)).ok(),
            bookmarks: true,
            send_initial_events: initial,
        };
        let ask = ask::send(&self.client, asked, self.request.watch(&params, version));
        let answer = timeout(self.options.request_timeout, ask).await;
        let answer = answer.map_err(|_elapsed| late(asked, self.options.request_timeout))??;
        self.report.heard(|_| ());
        Ok(answer)
    }

    /// Passes on what a watch says until it ends.
    async fn drain(&mut self, mut answer: Answer, version: &mut String) -> End {
        let asked = Asked::of(W::KIND, "watch");
        let opened = Instant::now();
        let mut said_something = false;
        // Not all quiet watches of a cluster at once.
        let patience = between(self.options.stall / 4 * 3, self.options.stall);
        let mut buffer = std::mem::take(&mut self.buffer);
        let end = loop {
            let text = match timeout(patience, answer.line(&mut buffer)).await {
                Ok(Ok(Some(text))) => text,
                Ok(Ok(None)) if said_something || opened.elapsed() >= SHORT => break End::Closed,
                Ok(Ok(None)) => {
                    break End::Failed(
                        asked.trouble(TroubleKind::Unreachable, "the watch ended at once"),
                    );
                }
                Ok(Err(trouble)) => break End::Failed(trouble),
                // K8S: only bookmarks newer than the start of the watch are sent (cacheWatcher.process,
                // v1.36), so silence from the start is what watches of quiet objects do. Asking anew
                // tells whether the server is there.
                Err(_) if !said_something => break End::Closed,
                Err(_) => {
                    self.report.count(|it| it.stalls += 1);
                    let message =
                        format!("neither event nor bookmark for {patience:?}: reconnecting");
                    break End::Failed(asked.trouble(TroubleKind::Stalled, message));
                }
            };
            match self.event(asked, text, version).await {
                Ok(()) => {
                    said_something = true;
                    self.last = None;
                    self.backoff.reset();
                }
                Err(end) => break end,
            }
        };
        self.buffer = buffer;
        end
    }

    /// One line of a watch.
    async fn event(&self, asked: Asked, text: &str, version: &mut String) -> Result<(), End> {
        let Some(line) = parse(asked, text).map_err(End::Failed)? else { return Ok(()) };
        let deleted = match &*line.event {
            "ADDED" | "MODIFIED" => false,
            "DELETED" => true,
            "BOOKMARK" => {
                self.report.heard(|it| it.bookmarks += 1);
                set_version(version, Head::read(line.object).version);
                return Ok(());
            }
            "ERROR" => {
                let trouble = status(asked, line.object.get());
                let expired = trouble.kind == TroubleKind::Expired;
                return Err(if expired { End::Expired(trouble) } else { End::Spoiled(trouble) });
            }
            _ => return Ok(()),
        };
        self.report.heard(|it| it.events += 1);
        let head = Head::read(line.object);
        let name = head.object_name();
        let feed = if deleted {
            self.report.problems(&name, Vec::new());
            Feed::Delete(name)
        } else {
            let read = wire::read::<W>(line.object);
            self.report.problems(&name, read.problems);
            read.value.map_or(Feed::Delete(name), |item| Feed::Apply(W::name(&item), item))
        };
        self.pass(feed).await;
        set_version(version, head.version);
        Ok(())
    }
}

fn set_version(version: &mut String, seen: String) {
    if !seen.is_empty() {
        *version = seen;
    }
}

impl<T> Found<T> {
    fn add<W: Watched<Item = T>>(&mut self, object: &serde_json::value::RawValue) {
        let read = wire::read::<W>(object);
        let head = || Head::read(object).object_name();
        let name = read.value.as_ref().map_or_else(head, W::name);
        if read.problems.is_empty() {
            self.problems.remove(&name);
        } else {
            self.problems.insert(name.clone(), read.problems);
        }
        match read.value {
            Some(item) => self.items.insert(name, item),
            None => self.items.remove(&name),
        };
    }

    fn remove(&mut self, name: &ObjectName) {
        self.items.remove(name);
        self.problems.remove(name);
    }
}

impl<T> Default for Found<T> {
    fn default() -> Self {
        Self { items: BTreeMap::new(), problems: BTreeMap::new() }
    }
}

/// One line of a watch; `None` for an empty one.
fn parse(asked: Asked, text: &str) -> Result<Option<Line<'_>>, Trouble> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let line = serde_json::from_str(text);
    line.map(Some).map_err(|error| garbled(asked, "an event", &error))
}

fn status(asked: Asked, object: &str) -> Trouble {
    let code = serde_json::from_str::<Status>(object).unwrap_or_default().code;
    let code = http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    asked.status(code, object, None)
}

fn garbled(asked: Asked, what: &str, error: &serde_json::Error) -> Trouble {
    asked.trouble(TroubleKind::Garbled, format!("{what} cannot be read: {error}"))
}

fn late(asked: Asked, bound: Duration) -> Trouble {
    asked.trouble(TroubleKind::TimedOut, format!("no answer within {bound:?}"))
}
