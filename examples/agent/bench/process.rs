//! The agent as a process: what it costs.

use std::{
    cell::RefCell,
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use proxier_testkit::lab::Ns;

use crate::{Options, Outcome, cluster::Cluster};

/// A running agent. Ends with this value, as does the folder with its files.
pub(crate) struct Agent {
    child: RefCell<Child>,
    node: Ns,
    folder: PathBuf,
}

impl Agent {
    /// Starts it on the node, with the API server as its only source.
    pub(crate) fn start(cluster: &Cluster, options: &Options) -> Outcome<Self> {
        let folder =
            std::env::temp_dir().join(format!("proxier-agent-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let kubeconfig = folder.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
             clusters: [{{name: a, cluster: {{server: '{}'}}}}]\n\
             contexts: [{{name: a, context: {{cluster: a, user: a}}}}]\nusers: [{{name: a, user: {{}}}}]\n",
            cluster.server.url()
        );
        fs::write(&kubeconfig, text)?;
        let config = folder.join("config");
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {}\n\
             oomScoreAdj: 0\nclientConnection: {{kubeconfig: {}}}\n---\n\
             apiVersion: proxier.config/v1alpha1\nkind: ProxierConfiguration\nsysctls: false\n",
            options.mode,
            kubeconfig.display()
        );
        fs::write(&config, text)?;
        let log = fs::File::create(folder.join("log"))?;
        let mut command = Command::new(&options.agent);
        command.arg("--config").arg(config).arg("--hostname-override=tern");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(log));
        let child = cluster.node.run(move || command.spawn())??;
        Ok(Self { child: RefCell::new(child), node: cluster.node.clone(), folder })
    }

    /// Fails when the process has ended.
    pub(crate) fn check(&self) -> Outcome {
        match self.child.borrow_mut().try_wait()? {
            None => Ok(()),
            Some(status) => {
                let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
                Err(format!("the agent ended with {status}:\n{log}").into())
            }
        }
    }

    /// A page of the metrics server.
    pub(crate) fn page(&self, path: &str) -> Outcome<String> {
        let text = self.node.run(|| -> std::io::Result<String> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 10249))?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            write!(stream, "GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })??;
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned());
        body.ok_or_else(|| format!("/{path}: no answer").into())
    }

    /// Operations on kernel objects so far.
    pub(crate) fn kernel_ops(&self) -> Outcome<u64> {
        let text = self.page("metrics")?;
        let values = text.lines().filter(|it| it.starts_with("proxier_kernel_ops_total{"));
        let values = values.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
        Ok(values.sum())
    }

    /// Resident memory now and at most, in MiB.
    pub(crate) fn memory(&self) -> Outcome<(u64, u64)> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let missing = "/proc/PID/status has no memory";
        Ok((field("VmRSS:").ok_or(missing)? / 1024, field("VmHWM:").ok_or(missing)? / 1024))
    }

    /// CPU time so far, of all threads that live.
    pub(crate) fn cpu(&self) -> Outcome<Duration> {
        let mut nanos = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.id()))? {
            // KERNEL: the first field is the time on a CPU in nanoseconds
            // (Documentation/scheduler/sched-stats.rst).
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            nanos += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
        }
        Ok(Duration::from_nanos(nanos))
    }

    fn id(&self) -> u32 {
        self.child.borrow().id()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let child = self.child.get_mut();
        // It may have ended by itself.
        child.kill().ok();
        child.wait().ok();
        fs::remove_dir_all(&self.folder).ok();
    }
}
