//! Kind `affinity`: flows of clients that have been here before.

use std::{net::SocketAddr, time::Duration};

use proxier_core::sim::{Lookup, Remembered, Sim};
use serde::Deserialize;
use serde_json::Value;

use super::{
    Case, CaseError, CaseFile, FlowVerdict,
    flow::{Flow, packet, source},
};

/// An earlier connection.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct History {
    src: Value,
    dst: String,
    to: SocketAddr,
    age: f64,
}

/// What affinity may remember: the connections that lead to a Service port of this world.
pub(super) fn remember<L: Lookup>(
    file: &CaseFile,
    case: &Case,
    sim: &Sim<'_, L>,
    history: &[History],
) -> Result<Vec<Remembered>, CaseError> {
    let mut memory = Vec::new();
    for (number, History { src, dst, to, age }) in history.iter().enumerate() {
        let part = format!("hist[{number}]");
        let source = source(file, case, src, &part)?;
        let packet = packet(&source, dst).map_err(|error| case.wrong(&part, error))?;
        if let Some(matched) = sim.trace(&packet, &[]).matched {
            memory.push(Remembered {
                client: packet.source,
                key: matched.key,
                id: matched.id,
                member: *to,
                age: Duration::from_secs_f64(*age),
            });
        }
    }
    Ok(memory)
}

/// An earlier connection as a flow of its own, that goes where it went, and its age.
pub(super) fn flows(file: &CaseFile, case: &Case) -> Result<Vec<(Flow, Duration)>, CaseError> {
    let history: Vec<History> = case.read_or("hist", Vec::new())?;
    let flow = |(number, History { src, dst, to, age }): (usize, &History)| {
        let part = format!("hist[{number}]");
        let source = source(file, case, src, &part)?;
        let packet = packet(&source, dst).map_err(|error| case.wrong(&part, error))?;
        let expected = FlowVerdict::Dnat([(*to, None)].into());
        Ok((Flow { source, packet, expected, deviation: None }, Duration::from_secs_f64(*age)))
    };
    history.iter().enumerate().map(flow).collect()
}
