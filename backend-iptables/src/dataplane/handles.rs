//! The kernel's numbers for rules in shared chains.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
};

use crate::object::Key;

/// Handles by key, 24 bytes each.
///
/// Keys are kept as 128 bits of hash with a seed of this process: 45,000 Services have some 150,000
/// shared rules, whose keys would take 20 MB. A key that is not here is not known, which is no error:
/// a look at the kernel tells.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    seeds: [RandomState; 2],
    known: HashMap<[u64; 2], u64>,
}

impl Handles {
    pub(crate) fn insert(&mut self, key: &Key, handle: u64) {
        self.known.insert(self.hash(key), handle);
    }

    pub(crate) fn remove(&mut self, key: &Key) {
        self.known.remove(&self.hash(key));
    }

    pub(crate) fn clear(&mut self) {
        self.known = HashMap::new();
    }

    pub(crate) fn find(&self, key: &Key) -> Option<u64> {
        self.known.get(&self.hash(key)).copied()
    }

    fn hash(&self, key: &Key) -> [u64; 2] {
        let [first, second] = &self.seeds;
        [first.hash_one(key), second.hash_one(key)]
    }
}
