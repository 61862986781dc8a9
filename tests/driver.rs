//! The driver and the manifests, on a fake kernel: no privileges needed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use proxier::{
    Driver, Family, Handle, Manifests, Pacing, Proxier,
    conntrack::{FlowFilter, Forgotten},
    engine::Engine,
    model::{Event, NodeEnv},
    spi::{CommitError, Dataplane, Op},
    testing::{FakeKernel, Fault, Toy},
};
use tokio::task::JoinHandle;

/// A fake kernel that can be looked at while a driver owns its proxier.
#[derive(Clone)]
struct Window(Arc<Mutex<FakeKernel<Toy>>>);

impl Window {
    fn look<T>(&self, look: impl FnOnce(&mut FakeKernel<Toy>) -> T) -> T {
        look(&mut self.0.lock().expect("nobody panics while holding it"))
    }

    fn frontends(&self) -> Vec<String> {
        self.look(|kernel| {
            let keys = kernel.objects.of(Family::V4).keys();
            keys.filter_map(|key| key.strip_prefix("2 frontend ").map(str::to_owned)).collect()
        })
    }

    fn take(&self) -> FakeKernel<Toy> {
        self.look(|kernel| std::mem::replace(kernel, FakeKernel::new(&Toy::new(true), 100)))
    }

    fn put(&self, kernel: FakeKernel<Toy>) {
        self.look(|place| *place = kernel);
    }
}

#[async_trait]
impl Dataplane<Toy> for Window {
    async fn commit(
        &mut self,
        family: Family,
        ops: &[Op<String, String>],
    ) -> Result<(), CommitError> {
        let mut kernel = self.take();
        let outcome = kernel.commit(family, ops).await;
        self.put(kernel);
        outcome
    }

    async fn dump(
        &mut self,
        family: Family,
    ) -> Result<std::collections::BTreeMap<String, String>, CommitError> {
        Ok(self.look(|kernel| kernel.objects.of(family).clone()))
    }

    async fn wipe(&mut self) -> Result<(), CommitError> {
        Ok(())
    }

    async fn forget_flows(
        &mut self,
        _: Family,
        _: &[FlowFilter],
    ) -> Result<Forgotten, CommitError> {
        Ok(Forgotten::default())
    }

    fn batch_limit(&self) -> usize {
        100
    }
}

fn start(pacing: Pacing) -> (Window, Handle, JoinHandle<Box<dyn Proxier>>) {
    let backend = Toy::new(true);
    let window = Window(Arc::new(Mutex::new(FakeKernel::new(&backend, 100))));
    let proxier = Box::new(Engine::new(backend, window.clone(), &Family::ALL));
    let (driver, handle) = Driver::new(proxier, NodeEnv::default(), pacing);
    (window, handle, tokio::spawn(driver.run(std::future::pending())))
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )
}

async fn feed(manifests: &mut Manifests, handle: &Handle) -> Vec<String> {
    let snapshot = manifests.read().expect("the directory can be listed");
    for event in snapshot.events() {
        handle.send(event).await.expect("the driver runs");
    }
    snapshot.problems().iter().map(ToString::to_string).collect()
}

/// A directory that goes when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("proxier-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder can be made");
        Self(path)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).expect("a file can be written");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

#[tokio::test]
async fn nothing_is_programmed_before_both_lists_are_complete() {
    let (window, handle, _task) = start(Pacing::default());
    handle.send(Event::Services(Vec::new())).await.unwrap();
    assert!(handle.settle().await.unwrap().last.is_none());
    assert_eq!(window.look(|kernel| kernel.commits), 0);
    handle.send(Event::EndpointSlices(Vec::new())).await.unwrap();
    let standing = handle.settle().await.unwrap();
    assert!(standing.last.is_some_and(|report| report.ops.add > 0));
}

#[tokio::test]
async fn an_edited_file_is_applied_within_a_tenth_of_a_second() {
    let folder = Folder::new("edit");
    folder.write("a.yaml", &service("cart", "10.96.0.1"));
    let (window, handle, _task) = start(Pacing::default());
    let mut manifests = Manifests::open(std::slice::from_ref(&folder.0)).unwrap();
    assert_eq!(feed(&mut manifests, &handle).await, [""; 0]);
    handle.settle().await.unwrap();
    assert_eq!(window.frontends(), ["10.96.0.1:80/TCP"]);

    let mut times = Vec::new();
    for round in 2..12 {
        let ip = format!("10.96.0.{round}");
        let began = Instant::now();
        folder.write("a.yaml", &service("cart", &ip));
        manifests.changed().await.unwrap();
        feed(&mut manifests, &handle).await;
        handle.settle().await.unwrap();
        times.push(began.elapsed());
        assert_eq!(window.frontends(), [format!("{ip}:80/TCP")]);
    }
    times.sort();
    // The median: a machine that is busy elsewhere must not fail the test.
    assert!(times[times.len() / 2] < Duration::from_millis(100), "{times:?}");
}

#[tokio::test]
async fn a_file_that_turns_bad_keeps_what_it_said_and_others_apply() {
    let folder = Folder::new("bad");
    let pair = service("cart", "10.96.0.1") + &service("dns", "10.96.0.2");
    folder.write("a.yaml", &pair);
    folder.write("ignored.txt", "{");
    let (window, handle, _task) = start(Pacing::default());
    let mut manifests = Manifests::open(std::slice::from_ref(&folder.0)).unwrap();
    feed(&mut manifests, &handle).await;

    let broken = service("cart", "10.96.0.9") + "---\nkind: Service\nspec: [\n";
    folder.write("a.yaml", &broken);
    folder.write(
        "b.json",
        r#"{"kind": "Service", "metadata": {"name": "new"},
        "spec": {"clusterIP": "10.96.0.3", "ports": [{"port": 80}]}}"#,
    );
    let problems = feed(&mut manifests, &handle).await;
    handle.settle().await.unwrap();
    assert_eq!(window.frontends(), ["10.96.0.2:80/TCP", "10.96.0.3:80/TCP", "10.96.0.9:80/TCP"]);
    assert!(problems[0].contains("a.yaml, document 2: line "), "{problems:?}");

    folder.write("a.yaml", &service("cart", "10.96.0.1"));
    assert_eq!(feed(&mut manifests, &handle).await, [""; 0]);
    fs::remove_file(folder.0.join("b.json")).unwrap();
    feed(&mut manifests, &handle).await;
    handle.settle().await.unwrap();
    assert_eq!(window.frontends(), ["10.96.0.1:80/TCP"]);
}

#[tokio::test]
async fn what_fails_is_tried_again_without_being_asked() {
    let (window, handle, _task) = start(Pacing::default());
    window
        .look(|kernel| kernel.faults = vec![Some(Fault::Transport), Some(Fault::Transport)].into());
    handle.send(Event::Services(Vec::new())).await.unwrap();
    handle.send(Event::EndpointSlices(Vec::new())).await.unwrap();
    let standing = handle.settle().await.unwrap();
    assert!(standing.failure.is_some_and(|it| it.contains("sending a batch")));
    let mut watcher = handle.standing();
    let recovered = watcher.wait_for(|standing| standing.failure.is_none());
    tokio::time::timeout(Duration::from_secs(10), recovered).await.expect("a retry").unwrap();
    assert!(window.look(|kernel| kernel.commits) > 0);
}

#[tokio::test]
async fn an_audit_repairs_what_others_changed() {
    let (window, handle, _task) = start(Pacing::default());
    handle.send(Event::Services(Vec::new())).await.unwrap();
    handle.send(Event::EndpointSlices(Vec::new())).await.unwrap();
    handle.settle().await.unwrap();
    window.look(|kernel| kernel.objects.v4.clear());
    let report = handle.audit().await.unwrap().last.unwrap();
    assert_eq!(report.drift, 2);
    assert_eq!(window.look(|kernel| kernel.objects.v4.len()), 2);
}

#[tokio::test]
async fn dropping_the_handle_ends_the_driver_and_leaves_everything_in_place() {
    let (window, handle, task) = start(Pacing::default());
    handle.send(Event::Services(Vec::new())).await.unwrap();
    handle.send(Event::EndpointSlices(Vec::new())).await.unwrap();
    handle.settle().await.unwrap();
    drop(handle);
    let proxier = task.await.unwrap();
    assert_eq!(proxier.status().programmed.v4, proxier.status().desired);
    assert!(window.look(|kernel| !kernel.objects.v4.is_empty()));
}

#[test]
fn a_missing_path_is_named() {
    let error = Manifests::open(&[PathBuf::from("/nonexistent/shop.yaml")]).unwrap_err();
    assert_eq!(error.to_string(), "/nonexistent/shop.yaml: cannot find it");
    assert!(!Path::new("/nonexistent").exists());
}
