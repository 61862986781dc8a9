//! What the cases have to know of a backend.

use std::collections::BTreeMap;

use proxier_core::{
    Family, Mode, ObjectName, Update,
    ir::NodeView,
    sim::{Packet, Remembered},
};
use serde::Deserialize;
use serde_json::json;

use super::{
    Case, CaseError, CaseFile, CaseWorld, FlowVerdict, Verdict, select::family, world::split,
};

/// Asks for the name of a kernel object.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct NameInput {
    /// What sort of object, in the mode's own words.
    pub kind: String,
    /// The Service's namespace.
    pub ns: String,
    /// The Service's name.
    pub name: String,
    /// The port's name.
    #[serde(default)]
    pub port: String,
    /// The port's protocol.
    #[serde(default)]
    pub proto: proxier_core::Protocol,
    /// Address and port of the endpoint, for objects of one endpoint.
    #[serde(default)]
    pub endpoint: Option<String>,
}

/// A backend, as far as cases ask about it.
pub trait Subject {
    /// Its mode.
    fn mode(&self) -> Mode;

    /// The name of a kernel object; `None` when the backend has none of that sort, or does not follow
    /// kube-proxy's names.
    fn name(&self, _input: &NameInput) -> Option<String> {
        None
    }

    /// How many objects of each sort one Service has after an update; `None` when its objects are not
    /// laid out as kube-proxy's. Objects of a sort that cases do not ask for are left out.
    ///
    /// # Errors
    /// The update cannot be programmed, in words.
    fn objects(
        &self,
        _update: Update,
        _service: &ObjectName,
        _family: Family,
    ) -> Result<Option<BTreeMap<String, usize>>, String> {
        Ok(None)
    }

    /// A fake kernel that this backend can program; `None` when there is no packet view of it.
    fn fake(&self) -> Option<Box<dyn FakeNode>>;
}

/// A fake kernel with a packet view: it interprets the backend's objects, and nothing else.
pub trait FakeNode {
    /// Programs a state.
    ///
    /// # Errors
    /// It cannot be programmed, in words.
    fn program(&mut self, update: Update) -> Result<(), String>;

    /// What becomes of a packet. `node` says which addresses the kernel calls local.
    fn judge(&self, node: &NodeView, packet: &Packet, memory: &[Remembered]) -> FlowVerdict;

    /// The objects it holds, for people.
    fn listing(&self) -> String;
}

pub(super) fn run_name(case: &Case, subjects: &[&dyn Subject]) -> Result<Verdict, CaseError> {
    let backend: String = case.read("backend")?;
    let input: NameInput = case.read("input")?;
    let Some(subject) = subjects.iter().find(|it| it.mode().name() == backend) else {
        return Ok(Verdict::not_applicable(format!("{backend} is not part of this build")));
    };
    let Some(actual) = subject.name(&input) else {
        return Ok(Verdict::not_applicable(format!("{backend} mode has names of its own")));
    };
    Ok(Verdict::compare(case.get("expect"), &json!(actual)))
}

pub(super) fn run_objects(
    file: &CaseFile,
    case: &Case,
    mode: Mode,
    subject: Option<&dyn Subject>,
) -> Result<Verdict, CaseError> {
    let Some(expected) = case.get("expect").get(mode.name()) else {
        return Ok(Verdict::not_applicable(format!("says nothing about {mode}")));
    };
    let Some(subject) = subject else {
        return Ok(Verdict::not_applicable(format!("{mode} is not part of this build")));
    };
    let world = CaseWorld::of(file, case)?;
    let (_, update) = world.store().map_err(|error| case.wrong("world", error))?;
    let key: String = case.read("service")?;
    let (namespace, name) = split(&key);
    let actual = subject
        .objects(update, &ObjectName::new(namespace, name), family(case)?)
        .map_err(|error| case.wrong("world", error))?;
    let Some(actual) = actual else {
        return Ok(Verdict::not_applicable(format!("{mode} mode has a layout of its own")));
    };
    let actual = json!(actual);
    Ok(if *expected == actual { Verdict::PASSED } else { Verdict::failed(expected, actual) })
}
