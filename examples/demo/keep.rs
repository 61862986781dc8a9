//! Time to look around.

use std::{
    io::{self, BufRead, Write},
    net::SocketAddr,
};

use proxier::Mode;
use proxier_testkit::lab::Ns;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    layout::{NODE, OUTSIDE, POD},
    screen::{DOT, Screen, wrap},
    stage::Stage,
};

/// Says how to get into the namespaces, and waits for Enter, Ctrl-C or a request to terminate.
pub(crate) async fn wait(
    stage: &Stage,
    mode: Mode,
    service: Option<SocketAddr>,
    screen: &mut Screen,
) {
    let screen_width = screen.width() - 2;
    // Together with --json, standard output is not for this.
    let mut say = |line: &str| {
        if screen.shows() {
            screen.line(line);
        } else {
            // Without anybody to read it there is nothing to do about it.
            drop(writeln!(io::stderr(), "{line}"));
        }
    };
    say("\nEverything is programmed. Look around from another terminal:");
    let namespaces = stage.world.lab().namespaces();
    let (usual, others): (Vec<_>, Vec<_>) =
        namespaces.iter().partition(|ns| [NODE, POD, OUTSIDE].contains(&ns.name()));
    for ns in usual {
        say(&format!("  {:<9}{}", ns.name(), ns.enter_hint()));
    }
    let number = |ns: &Ns| ns.path().file_name().map(|it| it.display().to_string());
    let others =
        others.into_iter().map(|ns| format!("{} {}", ns.name(), number(ns).unwrap_or_default()));
    say("The others are entered the same way, with another number behind fd/:");
    for line in wrap(&others.collect::<Vec<_>>().join(DOT), screen_width, DOT) {
        say(&format!("  {line}"));
    }
    if mode == Mode::Iptables {
        say(&format!(
            "\nThe rules, if iptables is installed:\n  {} iptables -t nat -S",
            stage.world.node().enter_hint()
        ));
    }
    if let (Some(pod), Some(at)) = (stage.world.pods().next(), service) {
        let (shell, ip, port) = (pod.enter_hint(), at.ip(), at.port());
        say(
            "\nA pod asks a Service; the answer says who it is, where it was reached, and who it saw:",
        );
        say(&format!("  {shell} bash -c 'head -1 < /dev/tcp/{ip}/{port}'"));
    }
    say("\nEnter or Ctrl-C ends it.");
    ended().await;
}

async fn ended() {
    let (tell, told) = tokio::sync::oneshot::channel();
    // Not a task: the end of the program does not wait for a thread that reads.
    std::thread::spawn(move || {
        let mut line = String::new();
        // The end of standard input is nobody's wish to stop.
        if io::stdin().lock().read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            tell.send(()).ok();
        } else {
            std::mem::forget(tell);
        }
    });
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::select! {
        _ = told => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
