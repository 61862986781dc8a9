//! Services from Kubernetes manifests on disk, followed as they change.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use inotify::{EventStream, Inotify, WatchMask};
use proxier_core::{
    manifest::{Manifest, ManifestProblem},
    model::{Event, NodeEnv, Problem},
};

/// Editors write a file in several steps; this long after the last one it is read.
const QUIET: Duration = Duration::from_millis(10);

/// The largest file that is read. A cluster of 45,000 Services prints about 150 MB.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// What standard input is called.
const STDIN: &str = "-";

/// Manifests in files, in directories (`*.yaml`, `*.yml`, `*.json`, not below), or on standard
/// input (`-`).
///
/// When a document of a file cannot be read, the file's other documents apply, and what the file
/// said before stays until it can be read again. A file that is removed takes its objects along.
#[derive(Debug)]
pub struct Manifests {
    paths: Vec<PathBuf>,
    /// Standard input can be read only once.
    stdin: Option<Manifest>,
    files: BTreeMap<PathBuf, File>,
    watch: Option<EventStream<[u8; 4096]>>,
}

#[derive(Debug)]
struct File {
    text: String,
    manifest: Manifest,
}

/// What the manifests say, all files together.
#[derive(Clone, Debug)]
pub struct Snapshot {
    manifest: Manifest,
}

/// Manifests could not be found or followed.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot {doing}", path.display())]
pub struct ManifestError {
    path: PathBuf,
    doing: &'static str,
    #[source]
    source: io::Error,
}

impl ManifestError {
    fn new(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { path, doing, source }
    }
}

impl Manifests {
    /// Prepares to read `paths` and starts to watch them. Reads nothing yet, except standard input,
    /// to its end, where that is among them.
    ///
    /// Must be called within a tokio runtime with I/O enabled.
    ///
    /// # Errors
    /// A path does not exist or cannot be watched, or standard input cannot be read.
    pub fn open(paths: &[PathBuf]) -> Result<Self, ManifestError> {
        let mut stdin = None;
        let mut on_disk = Vec::new();
        for path in paths {
            if path.as_os_str() == STDIN {
                let mut text = String::new();
                let read = io::stdin().take(MAX_FILE_BYTES).read_to_string(&mut text);
                read.map_err(ManifestError::new(path, "read it"))?;
                stdin = Some(Manifest::parse(STDIN, &text));
            } else {
                std::fs::metadata(path).map_err(ManifestError::new(path, "find it"))?;
                on_disk.push(path.clone());
            }
        }
        let watch = if on_disk.is_empty() { None } else { Some(watch(&on_disk)?) };
        Ok(Self { paths: on_disk, stdin, files: BTreeMap::new(), watch })
    }

    /// Reads everything there is now. Unchanged files are not parsed again.
    ///
    /// # Errors
    /// A directory cannot be listed. A file that cannot be read is a problem in the snapshot.
    pub fn read(&mut self) -> Result<Snapshot, ManifestError> {
        let mut files = BTreeMap::new();
        for path in self.list()? {
            let earlier = self.files.remove(&path);
            if let Some(file) = read_file(&path, earlier) {
                files.insert(path, file);
            }
        }
        self.files = files;
        let mut manifest = self.stdin.clone().unwrap_or_default();
        for file in self.files.values() {
            manifest.merge(file.manifest.clone());
        }
        Ok(Snapshot { manifest })
    }

    /// Waits until something may have changed. Never returns when there is nothing on disk to watch.
    ///
    /// # Errors
    /// The watch broke.
    ///
    /// # Cancel safety
    /// Safe to drop; a change in between is seen by the next call or by the next
    /// [`read`](Self::read).
    pub async fn changed(&mut self) -> Result<(), ManifestError> {
        let Some(events) = &mut self.watch else { return std::future::pending().await };
        let broken = || ManifestError::new(Path::new("manifests"), "watch them");
        match events.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(broken()(error)),
            None => return Err(broken()(io::ErrorKind::UnexpectedEof.into())),
        }
        while tokio::time::timeout(QUIET, events.next()).await.is_ok() {}
        while events.next().now_or_never().is_some() {}
        Ok(())
    }

    fn list(&self) -> Result<Vec<PathBuf>, ManifestError> {
        let mut found = Vec::new();
        for path in &self.paths {
            if !path.is_dir() {
                found.push(path.clone());
                continue;
            }
            let list = || ManifestError::new(path, "list it");
            for entry in std::fs::read_dir(path).map_err(list())? {
                let file = entry.map_err(list())?.path();
                if is_manifest(&file) {
                    found.push(file);
                }
            }
        }
        found.sort();
        found.dedup();
        Ok(found)
    }
}

impl Snapshot {
    /// Everything that was skipped or refused, in the order it was found.
    #[must_use]
    pub fn problems(&self) -> &[ManifestProblem] {
        &self.manifest.problems
    }

    /// Takes the node's properties and the Service ranges from the manifests: from the Node named
    /// `env.name`, or, while that is empty, from the only Node there is.
    pub fn observe_node(&self, env: &mut NodeEnv) -> Vec<Problem> {
        let mut nodes = self.manifest.nodes();
        let node = if env.name.is_empty() {
            nodes.next().filter(|_| nodes.next().is_none())
        } else {
            nodes.find(|node| node.metadata.name == env.name)
        };
        let ranges: Vec<_> = self.manifest.service_cidrs().collect();
        if !ranges.is_empty() {
            env.service_cidrs = ranges;
        }
        node.map(|node| env.observe(node)).unwrap_or_default()
    }

    /// The Node of that name, as the manifests have it.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&proxier_core::model::api::Node> {
        self.manifest.nodes().find(|node| node.metadata.name == name)
    }

    /// The contents as events for a [`Driver`](crate::Driver): complete lists.
    #[must_use]
    pub fn events(&self) -> [Event; 2] {
        [
            Event::EndpointSlices(self.manifest.slices().cloned().collect()),
            Event::Services(self.manifest.services().cloned().collect()),
        ]
    }

    /// The number of Services.
    #[must_use]
    pub fn services(&self) -> usize {
        self.manifest.services().count()
    }
}

fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().and_then(OsStr::to_str).is_none_or(|name| name.starts_with('.'));
    let extension = path.extension().and_then(OsStr::to_str);
    !hidden && matches!(extension, Some("json" | "yaml" | "yml"))
}

/// Reads a file; `None` when it is gone.
fn read_file(path: &Path, earlier: Option<File>) -> Option<File> {
    let name = path.display().to_string();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            let mut manifest = Manifest::unreadable_file(&name, &error.to_string());
            if let Some(earlier) = &earlier {
                manifest.fall_back(&earlier.manifest);
            }
            return Some(File { text: String::new(), manifest });
        }
    };
    match earlier {
        Some(earlier) if earlier.text == text => Some(earlier),
        earlier => {
            let mut manifest = Manifest::parse(&name, &text);
            if let Some(earlier) = earlier.filter(|_| manifest.is_damaged()) {
                manifest.fall_back(&earlier.manifest);
            }
            Some(File { text, manifest })
        }
    }
}

/// Watches the directories that hold `paths`: an editor may replace a file by another one.
fn watch(paths: &[PathBuf]) -> Result<EventStream<[u8; 4096]>, ManifestError> {
    let changes = WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVED_FROM
        | WatchMask::MOVED_TO;
    let first = paths.first().map(PathBuf::as_path).unwrap_or_else(|| Path::new("manifests"));
    let inotify = Inotify::init().map_err(ManifestError::new(first, "watch it"))?;
    for path in paths {
        let directory = if path.is_dir() { Some(path.as_path()) } else { path.parent() };
        let here = Path::new(".");
        let directory = directory.filter(|it| !it.as_os_str().is_empty()).unwrap_or(here);
        let added = inotify.watches().add(directory, changes);
        added.map_err(ManifestError::new(path, "watch it"))?;
    }
    inotify.into_event_stream([0; 4096]).map_err(ManifestError::new(first, "watch it"))
}
