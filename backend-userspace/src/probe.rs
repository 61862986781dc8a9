//! Finds out whether the mode works here, and says why not. Changes nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{FutureExt, future::BoxFuture};
use proxier_core::{Family, Protocol, Suitability, ir::FamilyView};
use proxier_netlink::{
    NetNs,
    ct::{Conntrack, Layer4, Tuple},
    gate,
};
use tracing::info;

use crate::{
    backend::Ports,
    config::{Capture, Method},
    dataplane::RouteSocket,
    object::part,
    skeleton::skeleton,
};

/// What to do where capturing does not work.
const INSTEAD: &str = "without kernel rules, at addresses you name (`Listen::Addresses`), the mode \
                       works anywhere";

/// What it means to redirect.
const REDIRECTED: &str = "traffic is redirected: endpoints see an address of the node, not the client's; \
                          UDP sessions end after 25 seconds of silence at the latest";

/// Finds out whether capturing works in a network namespace, in these families, and how.
///
/// Every rule is tried in a transaction that is then given up, so nothing is left behind, and what
/// the kernel lacks is named. It may load kernel modules, as the first sync would.
///
/// # Cancel safety
/// Safe to drop and to call again.
pub async fn probe(netns: &NetNs, method: Method, families: &[Family]) -> Suitability {
    let (found, mut reasons) = find(method, |it| missing(netns, it, families).boxed()).await;
    match found {
        Some(Method::Redirect) => reasons.push(REDIRECTED.to_owned()),
        Some(Method::Auto | Method::Tproxy) => {}
        None => reasons.push(INSTEAD.to_owned()),
    }
    Suitability { available: found.is_some(), reasons }
}

/// The method that `method` comes down to here; it stays [`Method::Auto`] where none works.
/// Blocks for some milliseconds.
pub(crate) fn decide(netns: &NetNs, method: Method, families: &[Family]) -> Method {
    if method != Method::Auto {
        return method;
    }
    let probing = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        let missing = |it| missing(netns, it, families).boxed();
        Some(runtime.block_on(find(method, missing)))
    };
    // In a thread of its own: the caller's may have a runtime already.
    let found = NetNs::Current.run(probing).ok().flatten();
    let Some((Some(method), missing)) = found else { return method };
    if !missing.is_empty() {
        info!(?missing, "{REDIRECTED}");
    }
    method
}

/// The first method for which nothing is missing, and what is missing for those before it.
async fn find<'a>(
    method: Method,
    missing: impl Fn(Method) -> BoxFuture<'a, Vec<String>>,
) -> (Option<Method>, Vec<String>) {
    let candidates = match method {
        Method::Auto => &[Method::Tproxy, Method::Redirect][..],
        Method::Redirect => &[Method::Redirect],
        Method::Tproxy => &[Method::Tproxy],
    };
    let mut reasons = Vec::new();
    for candidate in candidates {
        let missing = missing(*candidate).await;
        if missing.is_empty() {
            return (Some(*candidate), reasons);
        }
        reasons.extend(missing);
    }
    (None, reasons)
}

/// What is missing for a method, one sentence for each family.
async fn missing(netns: &NetNs, method: Method, families: &[Family]) -> Vec<String> {
    let name = match method {
        Method::Redirect => "redirecting",
        Method::Auto | Method::Tproxy => "TPROXY",
    };
    let mut missing = Vec::new();
    for family in families {
        if let Err(reason) = try_family(netns, method, *family).await {
            missing.push(format!("{name} for {family}: {reason}"));
        }
    }
    missing
}

async fn try_family(netns: &NetNs, method: Method, family: Family) -> Result<(), String> {
    let capture = Capture { method, ..Capture::default() };
    let objects = skeleton(&capture, &Ports::default(), family, &FamilyView::default());
    gate::try_out(netns, family, objects, part).await?;
    if method == Method::Redirect {
        // Datagrams do not say where they were sent to.
        let mut conntrack = Conntrack::open(netns).map_err(|error| error.to_string())?;
        let found = conntrack.answered(&nobodys(family)).await;
        return found.map(drop).map_err(|error| error.to_string());
    }
    let routes = RouteSocket::open(netns).map_err(|error| error.to_string())?;
    let allowed = routes.try_rules(family).await;
    allowed.map_err(|error| format!("no policy routing: {error}"))
}

/// A flow that does not exist.
fn nobodys(family: Family) -> Tuple {
    let ip = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let layer4 = Layer4::Ports { src: 0, dst: 0 };
    Tuple { src: ip, dst: ip, protocol: Protocol::Udp.number(), layer4, zone: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn found(method: Method, works: &[Method]) -> (Option<Method>, Vec<String>) {
        let missing = |it| if works.contains(&it) { vec![] } else { vec![format!("no {it:?}")] };
        find(method, |it| std::future::ready(missing(it)).boxed()).await
    }

    #[tokio::test]
    async fn what_works_is_used_and_what_is_missing_is_told() {
        use Method::{Auto, Redirect, Tproxy};
        let said = |it: &[&str]| it.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(found(Auto, &[Tproxy, Redirect]).await, (Some(Tproxy), said(&[])));
        assert_eq!(found(Auto, &[Redirect]).await, (Some(Redirect), said(&["no Tproxy"])));
        assert_eq!(found(Auto, &[]).await, (None, said(&["no Tproxy", "no Redirect"])));
        assert_eq!(found(Redirect, &[Tproxy]).await, (None, said(&["no Redirect"])));
        assert_eq!(found(Tproxy, &[Redirect]).await, (None, said(&["no Tproxy"])));
    }
}
