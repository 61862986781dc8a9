//! Virtual servers on a real kernel, checked against ipvsadm. One binary: each boots a guest.

#![cfg(test)]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use proxier_netlink::dummy::Links;
use proxier_netlink::ipvs::{
    AddressFamily, Batch, Dest, DestEntry, Forward, Ipvs, OpKind, Persistence, Protocol,
    SCHEDULERS, Service, ServiceFlags, Timeouts, VirtualServer,
};
use proxier_netlink::{ErrorKind, NetNs};
use proxier_testkit::eventually_async;
use tokio::sync::Mutex;

/// What an error says, the operation, its kind, and how it is added.
type Refused<'a> = (&'a str, OpKind, ErrorKind, &'a dyn Fn(&mut Batch));

/// A namespace with loopback up: without, destinations are refused.
struct Lab {
    ns: NetNs,
    ipvs: Ipvs,
}

impl Lab {
    async fn new() -> Self {
        let ns = NetNs::create().expect("a network namespace: run the tests as root");
        let ipvs = Ipvs::open(&ns).await.expect("a kernel with IPVS: see CONTRIBUTING.md");
        let lab = Self { ns, ipvs };
        lab.run("ip link set lo up");
        lab
    }

    fn run(&self, line: &str) -> String {
        let out = self.ns.run(|| Command::new("sh").args(["-c", line]).output()).unwrap().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "`{line}`: {}\n{text}{errors}", out.status);
        text
    }

    /// What ipvsadm would restore, in order.
    fn saved(&self) -> Vec<String> {
        let mut lines: Vec<_> =
            self.run("ipvsadm -S -n").lines().map(|l| l.trim().to_owned()).collect();
        lines.sort();
        lines
    }

    async fn apply(&mut self, build: impl FnOnce(&mut Batch)) {
        let mut batch = Batch::new();
        build(&mut batch);
        let refused = self.ipvs.commit(&batch).await.unwrap();
        assert!(refused.is_empty(), "{refused:#?}");
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn server(address: &str, port: u16, protocol: Protocol) -> VirtualServer {
    VirtualServer::address(ip(address), port, protocol)
}

#[tokio::test]
async fn every_attribute_is_what_ipvsadm_saves() {
    let mut lab = Lab::new().await;
    let tcp = server("10.96.0.1", 80, Protocol::TCP);
    let udp = server("10.96.0.1", 53, Protocol::UDP);
    let sctp = server("10.96.0.2", 99, Protocol::SCTP);
    let six = server("fd00:96::1", 443, Protocol::TCP);
    let mark = VirtualServer::mark(7, AddressFamily::Ipv4);
    let mark6 = VirtualServer::mark(8, AddressFamily::Ipv6);
    let subnet = Persistence { timeout_secs: 600, prefix_len: 24 };
    let subnet6 = Persistence { timeout_secs: 10_800, prefix_len: 64 };
    let services = [
        Service::new(tcp, "wrr").persistent(subnet),
        Service::new(udp, "rr").flags(ServiceFlags::ONE_PACKET),
        Service::new(sctp, "sh").flags(ServiceFlags::SH_PORT | ServiceFlags::SH_FALLBACK),
        Service::new(six, "mh").flags(ServiceFlags::MH_PORT).persistent(subnet6),
        Service::new(mark, "mh").flags(ServiceFlags::MH_FALLBACK),
        Service::new(mark6, "lc").persistent(Persistence::new(60, AddressFamily::Ipv6)),
    ];
    let limited =
        Dest { upper_threshold: 50, lower_threshold: 20, ..Dest::new(ip("10.1.0.1"), 8080) };
    let direct = Dest { forward: Forward::DIRECT_ROUTE, ..Dest::new(ip("10.1.0.2"), 80).weight(0) };
    let tunnel = Dest { forward: Forward::TUNNEL, ..Dest::new(ip("10.1.0.3"), 80).weight(65_535) };
    let dest6 = Dest::new(ip("fd00:1::1"), 8443).weight(3);
    lab.apply(|b| {
        services.iter().for_each(|s| b.new_service(s));
        [limited, direct, tunnel].iter().for_each(|d| b.new_dest(tcp, d));
        b.new_dest(six, &dest6);
        b.new_dest(mark, &Dest::new(ip("10.1.0.9"), 0));
    })
    .await;
    // Thresholds it does not save; they are read back below.
    let expected = [
        "-A -f 7 -s mh -b mh-fallback",
        "-A -f 8 -6 -s lc -p 60",
        "-A -t 10.96.0.1:80 -s wrr -p 600 -M 255.255.255.0",
        "-A -t [fd00:96::1]:443 -s mh -p 10800 -M 64 -b mh-port",
        "-A -u 10.96.0.1:53 -s rr -o",
        "-A --sctp-service 10.96.0.2:99 -s sh -b sh-fallback,sh-port",
        "-a -f 7 -r 10.1.0.9:0 -m -w 1",
        "-a -t 10.96.0.1:80 -r 10.1.0.1:8080 -m -w 1",
        "-a -t 10.96.0.1:80 -r 10.1.0.2:80 -g -w 0",
        "-a -t 10.96.0.1:80 -r 10.1.0.3:80 -i -w 65535 --tun-type ipip",
        "-a -t [fd00:96::1]:443 -r [fd00:1::1]:8443 -m -w 3",
    ];
    let mut expected: Vec<_> = expected.map(str::to_owned).into();
    expected.sort();
    assert_eq!(lab.saved(), expected);

    // And read back.
    let mut listed = lab.ipvs.services().await.unwrap();
    listed.sort_by_key(|e| e.service.key);
    let mut wanted = services.to_vec();
    wanted.sort_by_key(|s| s.key);
    assert_eq!(listed.iter().map(|e| e.service.clone()).collect::<Vec<_>>(), wanted);
    for service in &services {
        let entry = lab.ipvs.service(service.key).await.unwrap().unwrap();
        assert_eq!(&entry.service, service);
    }
    let mut dests: Vec<_> =
        lab.ipvs.dests(tcp).await.unwrap().into_iter().map(|d| d.dest).collect();
    dests.sort_by_key(|d| d.address);
    assert_eq!(dests, [limited, direct, tunnel]);
    assert_eq!(lab.ipvs.dests(six).await.unwrap()[0].dest, dest6);
    assert!(lab.ipvs.dests(server("10.9.9.9", 1, Protocol::TCP)).await.unwrap().is_empty());
    assert!(lab.ipvs.service(server("10.9.9.9", 1, Protocol::TCP)).await.unwrap().is_none());
}

#[tokio::test]
async fn what_ipvsadm_adds_is_read() {
    let mut lab = Lab::new().await;
    lab.run(
        "ipvsadm -A -t 10.96.0.1:80 -s sed -p 300 -M 255.255.0.0 && \
         ipvsadm -a -t 10.96.0.1:80 -r 10.1.0.1:81 -m -w 7 -x 9 -y 3 && \
         ipvsadm -A -t 10.96.0.2:5060 -s rr -p 60 && ipvsadm -A -u '[fd00::1]:53' -s nq -o",
    );
    let tcp = server("10.96.0.1", 80, Protocol::TCP);
    let entry = lab.ipvs.service(tcp).await.unwrap().unwrap();
    let persistence = Persistence { timeout_secs: 300, prefix_len: 16 };
    assert_eq!(entry.service, Service::new(tcp, "sed").persistent(persistence));
    assert_eq!(entry.engine, None);
    let dest = Dest { upper_threshold: 9, lower_threshold: 3, ..Dest::new(ip("10.1.0.1"), 81) };
    assert_eq!(lab.ipvs.dests(tcp).await.unwrap()[0].dest, dest.weight(7));
    let udp = lab.ipvs.service(server("fd00::1", 53, Protocol::UDP)).await.unwrap().unwrap();
    assert_eq!(udp.service.flags, ServiceFlags::ONE_PACKET);
    assert_eq!(lab.ipvs.services().await.unwrap().len(), 3);
}

#[tokio::test]
async fn changes_keep_what_they_do_not_name() {
    let mut lab = Lab::new().await;
    let key = server("10.96.0.1", 80, Protocol::TCP);
    let dest = Dest::new(ip("10.1.0.1"), 80);
    lab.apply(|b| {
        b.new_service(&Service::new(key, "rr").persistent(Persistence::new(5, key.family())));
        b.new_dest(key, &dest);
    })
    .await;
    lab.apply(|b| {
        b.set_service(&Service::new(key, "sh").flags(ServiceFlags::SH_PORT));
        b.set_dest(key, &dest.weight(9));
    })
    .await;
    let changed =
        ["-A -t 10.96.0.1:80 -s sh -b sh-port", "-a -t 10.96.0.1:80 -r 10.1.0.1:80 -m -w 9"];
    assert_eq!(lab.saved(), changed);
    lab.apply(|b| b.set_service(&Service::new(key, "rr"))).await;
    assert_eq!(lab.saved()[0], "-A -t 10.96.0.1:80 -s rr");
    lab.apply(|b| b.del_dest(key, dest.address, dest.port)).await;
    assert_eq!(lab.saved(), ["-A -t 10.96.0.1:80 -s rr"]);
    lab.apply(|b| b.del_service(key)).await;
    assert!(lab.saved().is_empty());
}

#[tokio::test]
async fn schedulers_are_found_without_leaving_anything() {
    let mut lab = Lab::new().await;
    let found = lab.ipvs.schedulers().await.unwrap();
    assert!(found.len() >= 13 && SCHEDULERS.contains(&found[0]), "{found:?}");
    for unknown in ["nonesuch", "a-name-of-16-byte", ""] {
        assert!(!lab.ipvs.has_scheduler(unknown).await.unwrap(), "{unknown:?}");
    }
    assert!(lab.saved().is_empty());
    let mut port = 1;
    for scheduler in found {
        port += 1;
        let key = server("10.96.0.1", port, Protocol::TCP);
        lab.apply(|b| b.new_service(&Service::new(key, scheduler))).await;
        assert!(lab.saved().contains(&format!("-A -t 10.96.0.1:{port} -s {scheduler}")));
    }
}

#[tokio::test]
async fn a_refused_operation_is_told_and_the_others_are_carried_out() {
    let mut lab = Lab::new().await;
    let key = server("10.96.0.1", 80, Protocol::TCP);
    let gone = server("10.96.0.9", 80, Protocol::TCP);
    let dest = Dest::new(ip("10.1.0.1"), 8080);
    let mut batch = Batch::new();
    let ops: [Refused<'_>; 9] = [
        ("it is there already", OpKind::NewService, ErrorKind::Conflict, &|b| {
            b.new_service(&Service::new(key, "rr"));
        }),
        (
            "no scheduler \"nonesuch\": module ip_vs_nonesuch",
            OpKind::NewService,
            ErrorKind::Unsupported,
            &|b| {
                b.new_service(&Service::new(gone, "nonesuch"));
            },
        ),
        ("there is no such virtual server", OpKind::SetService, ErrorKind::Conflict, &|b| {
            b.set_service(&Service::new(gone, "rr"));
        }),
        ("there is no such virtual server", OpKind::DelService, ErrorKind::Conflict, &|b| {
            b.del_service(gone);
        }),
        ("it is there already", OpKind::NewDest, ErrorKind::Conflict, &|b| b.new_dest(key, &dest)),
        ("there is no such virtual server", OpKind::NewDest, ErrorKind::Conflict, &|b| {
            b.new_dest(gone, &dest);
        }),
        ("no such destination", OpKind::DelDest, ErrorKind::Conflict, &|b| {
            b.del_dest(key, ip("10.1.0.7"), 1);
        }),
        ("the lower threshold above the upper one", OpKind::SetDest, ErrorKind::Fatal, &|b| {
            b.set_dest(key, &Dest { upper_threshold: 1, lower_threshold: 2, ..dest });
        }),
        ("not an address of one host", OpKind::NewDest, ErrorKind::Fatal, &|b| {
            b.new_dest(key, &Dest::new(ip("224.0.0.1"), 80));
        }),
    ];
    batch.new_service(&Service::new(key, "rr"));
    batch.new_dest(key, &dest);
    for (tag, (.., add)) in (0..).zip(&ops) {
        batch.op(tag);
        add(&mut batch);
    }
    batch.op(99);
    let last = Dest::new(ip("10.1.0.2"), 8080);
    batch.new_dest(key, &last);
    let refused = lab.ipvs.commit(&batch).await.unwrap();
    assert_eq!(refused.len(), ops.len(), "{refused:#?}");
    for (tag, ((text, op, kind, _), refusal)) in (0..).zip(ops.iter().zip(&refused)) {
        assert_eq!((refusal.tag, refusal.op, refusal.kind()), (Some(tag), *op, *kind), "{refusal}");
        assert!(refusal.to_string().contains(text), "{refusal}");
    }
    assert_eq!(refused[1].unknown_scheduler(), Some("nonesuch"));
    assert!(refused[3].is_already_gone() && refused[6].is_already_gone());
    assert!(refused[6].to_string().contains("10.1.0.7:1 of tcp 10.96.0.1:80"), "{}", refused[6]);
    assert_eq!(lab.ipvs.dests(key).await.unwrap().len(), 2);
}

#[tokio::test]
async fn timeouts_and_version_are_those_of_ipvsadm() {
    let mut lab = Lab::new().await;
    lab.ipvs
        .set_timeouts(Timeouts { tcp_secs: 777, tcp_fin_secs: 66, udp_secs: 55 })
        .await
        .unwrap();
    lab.ipvs.set_timeouts(Timeouts { udp_secs: 44, ..Timeouts::default() }).await.unwrap();
    let read = lab.ipvs.timeouts().await.unwrap();
    assert_eq!(read, Timeouts { tcp_secs: 777, tcp_fin_secs: 66, udp_secs: 44 });
    assert!(lab.run("ipvsadm -L --timeout").contains("777 66 44"));
    let info = lab.ipvs.info().await.unwrap();
    let (major, minor, patch) = info.version;
    let line = format!("version {major}.{minor}.{patch} (size={})", info.table_size);
    assert!(lab.run("ipvsadm -L -n").contains(&line), "{line}");
}

/// Waits until the first destination is so.
async fn wait(
    lab: &mut Lab,
    key: VirtualServer,
    what: &str,
    is_so: impl Fn(&DestEntry) -> bool,
) -> DestEntry {
    let found = Mutex::new((&mut lab.ipvs, None));
    let look = || async {
        let (ipvs, last) = &mut *found.lock().await;
        *last = ipvs.dests(key).await.unwrap().into_iter().next();
        last.as_ref().is_some_and(&is_so)
    };
    eventually_async(Duration::from_secs(30), what, look).await.unwrap();
    found.into_inner().1.expect("it was looked at")
}

#[tokio::test]
async fn connections_are_counted_as_ipvsadm_counts_them() {
    let mut lab = Lab::new().await;
    let links = Links::open(&lab.ns).unwrap();
    let dummy = links.ensure_dummy("vs0", false).await.unwrap();
    assert!(links.add_addresses(dummy.index, &[ip("10.96.0.1")]).await.is_empty());
    let listener = lab.ns.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let port = listener.local_addr().unwrap().port();
    let key = server("10.96.0.1", 80, Protocol::TCP);
    lab.apply(|b| {
        b.new_service(&Service::new(key, "rr"));
        b.new_dest(key, &Dest::new(ip("127.0.0.1"), port));
    })
    .await;
    let echo = std::thread::spawn(move || {
        (0..5)
            .map(|_| {
                let (mut peer, _) = listener.accept().unwrap();
                let mut byte = [0];
                peer.read_exact(&mut byte).unwrap();
                peer.write_all(&byte).unwrap();
                peer
            })
            .collect::<Vec<_>>()
    });
    let clients: Vec<_> = lab
        .ns
        .run(|| {
            (0..5)
                .map(|n| {
                    let address = "10.96.0.1:80".parse().unwrap();
                    let mut client =
                        TcpStream::connect_timeout(&address, Duration::from_secs(10)).unwrap();
                    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    client.write_all(&[n]).unwrap();
                    let mut byte = [0];
                    client.read_exact(&mut byte).unwrap();
                    assert_eq!(byte, [n]);
                    client
                })
                .collect()
        })
        .unwrap();
    let _peers = echo.join().unwrap();
    let dests = lab.ipvs.dests(key).await.unwrap();
    assert_eq!((dests[0].active, dests[0].inactive, dests[0].persistent), (5, 0, 0));
    // KERNEL: what is told is summed up every two seconds (net/netfilter/ipvs/ip_vs_est.c, v6.1).
    let counted =
        wait(&mut lab, key, "5 connections counted", |it| it.stats.connections >= 5).await;
    let stats = lab.ipvs.service(key).await.unwrap().unwrap().stats;
    assert_eq!((stats.connections, counted.stats.connections), (5, 5));
    assert!(stats.in_packets >= 15 && stats.out_packets >= 10 && stats.in_bytes > stats.in_packets);
    let line = lab.run("ipvsadm -L -n --stats --exact | grep '^TCP'");
    let told: Vec<u64> = line.split_whitespace().skip(2).map(|n| n.parse().unwrap()).collect();
    let ours = lab.ipvs.service(key).await.unwrap().unwrap().stats;
    let ours = [ours.connections, ours.in_packets, ours.out_packets, ours.in_bytes, ours.out_bytes];
    assert_eq!(told, ours, "{line}");
    drop(clients);
    let ended = wait(&mut lab, key, "connections to end", |it| it.active == 0).await;
    assert_eq!(ended.inactive, 5);
}

#[tokio::test]
async fn ten_thousand_virtual_servers_are_loaded_and_listed() {
    let mut lab = Lab::new().await;
    let key =
        |n: u32| server(&std::net::Ipv4Addr::from(0x0a60_0000 + n).to_string(), 80, Protocol::TCP);
    let mut batch = Batch::new();
    for n in 0..10_000 {
        batch.new_service(&Service::new(key(n), "rr"));
        for d in 0..10 {
            let address = std::net::Ipv4Addr::from(0x0a01_0000 + n * 10 + d);
            batch.new_dest(key(n), &Dest::new(address.into(), 8080));
        }
    }
    assert_eq!(batch.len(), 110_000);
    let start = Instant::now();
    assert!(lab.ipvs.commit(&batch).await.unwrap().is_empty());
    let loaded = start.elapsed();
    let listed = lab.ipvs.services().await.unwrap();
    assert_eq!(listed.len(), 10_000);
    let mut dests = 0;
    for entry in &listed {
        dests += lab.ipvs.dests(entry.service.key).await.unwrap().len();
    }
    assert_eq!(dests, 100_000);
    println!("loaded in {loaded:?}, listed by {:?}", start.elapsed());
    // Far above what it takes (about a second); one request at a time would be near it.
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[tokio::test]
async fn namespaces_do_not_see_each_other() {
    let mut one = Lab::new().await;
    let mut two = Lab::new().await;
    let key = server("10.96.0.1", 80, Protocol::TCP);
    one.apply(|b| b.new_service(&Service::new(key, "rr"))).await;
    assert!(two.ipvs.services().await.unwrap().is_empty() && two.saved().is_empty());
    assert_eq!((one.ipvs.services().await.unwrap().len(), one.saved().len()), (1, 1));
}

#[tokio::test]
async fn without_the_privilege_nothing_is_told() {
    let lab = Lab::new().await;
    lab.ns
        .run(|| {
            let mut sets = rustix::thread::capabilities(None).unwrap();
            sets.effective = rustix::thread::CapabilitySet::empty();
            sets.permitted = rustix::thread::CapabilitySet::empty();
            rustix::thread::set_capabilities(None, sets).unwrap();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut ipvs = Ipvs::open(&NetNs::Current).await.unwrap();
                let error = ipvs.services().await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Permission);
                assert!(error.to_string().contains("needs CAP_NET_ADMIN"), "{error}");
                let mut batch = Batch::new();
                let key = server("10.96.0.1", 80, Protocol::TCP);
                batch.new_service(&Service::new(key, "rr"));
                let refused = ipvs.commit(&batch).await.unwrap();
                assert_eq!(refused[0].kind(), ErrorKind::Permission, "{}", refused[0]);
            });
        })
        .unwrap();
}

#[tokio::test]
async fn a_dummy_link_and_its_addresses_come_and_go() {
    let lab = Lab::new().await;
    let links = Links::open(&lab.ns).unwrap();
    assert_eq!(links.find_dummy("vs0").await.unwrap(), None);
    let made = links.ensure_dummy("vs0", false).await.unwrap();
    let again = links.ensure_dummy("vs0", true).await.unwrap();
    assert_eq!((made.created, again.created, again.index), (true, false, made.index));
    assert!(lab.run("ip -br link show vs0").contains("UP"));
    let mut addresses: Vec<IpAddr> =
        (0..300_u32).map(|n| std::net::Ipv4Addr::from(0x0a60_0000 + n).into()).collect();
    addresses.push(ip("fd00:96::1"));
    assert!(links.add_addresses(made.index, &addresses).await.is_empty());
    assert!(links.add_addresses(made.index, &addresses).await.is_empty(), "twice is fine");
    let count = |all: &[proxier_netlink::dummy::LinkAddress]| {
        all.iter().filter(|a| a.index == made.index && addresses.contains(&a.address)).count()
    };
    let all = links.addresses().await.unwrap();
    assert_eq!(count(&all), 301);
    assert!(all.iter().any(|a| a.address == ip("127.0.0.1") && a.prefix_len == 8));
    assert!(lab.run("ip addr show vs0").contains("inet6 fd00:96::1/128"));
    assert!(links.remove_addresses(made.index, &addresses[..299]).await.is_empty());
    assert!(links.remove_addresses(made.index, &addresses[..299]).await.is_empty());
    assert_eq!(count(&links.addresses().await.unwrap()), 2);
    assert!(links.delete_dummy("vs0").await.unwrap() && !links.delete_dummy("vs0").await.unwrap());
    assert!(links.remove_addresses(made.index, &addresses[..1]).await.is_empty());
    let refused = links.add_addresses(made.index, &addresses[..1]).await;
    assert_eq!(refused[0].kind(), ErrorKind::Conflict, "{}", refused[0]);
    lab.run("ip link add vs1 type veth peer name vs2");
    for error in [
        links.ensure_dummy("vs1", true).await.unwrap_err(),
        links.delete_dummy("vs1").await.map(drop).unwrap_err(),
    ] {
        assert!(error.to_string().contains("vs1 is there and is not of type dummy"), "{error}");
    }
}
