//! One copy of names that very many objects have.

use std::{collections::HashSet, sync::Arc};

/// So many names that nothing has any more are always put up with.
const FEW: usize = 256;

/// The names of nodes, zones and ports: every endpoint has one of a node, of which a cluster has few.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: HashSet<Arc<str>>,
    /// How many there were when they were last tidied.
    tidy: usize,
}

impl Names {
    /// The copy that there is of a name, or a new one.
    pub(super) fn intern(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.known.get(name) {
            return Arc::clone(known);
        }
        let name: Arc<str> = name.into();
        self.known.insert(Arc::clone(&name));
        name
    }

    /// Makes names that are known already the same copies.
    #[expect(single_use_lifetimes, reason = "an anonymous lifetime is not stable in impl Trait")]
    pub(super) fn share<'a>(&mut self, names: impl Iterator<Item = &'a mut Arc<str>>) {
        for name in names {
            match self.known.get(name) {
                Some(known) => name.clone_from(known),
                None => drop(self.known.insert(Arc::clone(name))),
            }
        }
        if self.known.len() > 2 * self.tidy + FEW {
            self.known.retain(|name| Arc::strong_count(name) > 1);
            self.tidy = self.known.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shared_and_forgotten() {
        let mut names = Names::default();
        let mut held: Vec<Arc<str>> = ["tern", "gull", "tern"].map(Arc::from).into();
        names.share(held.iter_mut());
        assert!(Arc::ptr_eq(&held[0], &held[2]) && !Arc::ptr_eq(&held[0], &held[1]));
        for number in 0..10 * FEW {
            names.share([&mut Arc::from(format!("node-{number}"))].into_iter());
            assert!(names.known.len() <= FEW + 2 * held.len() + 1, "{}", names.known.len());
        }
        let mut again: Arc<str> = "gull".into();
        names.share([&mut again].into_iter());
        assert!(Arc::ptr_eq(&again, &held[1]), "what is in use is kept");
    }
}
