//! A bounded map that gives up what was not used for longest.

use std::{
    borrow::Borrow,
    collections::{HashMap, VecDeque},
    hash::Hash,
    time::{Duration, Instant},
};

/// A bounded map; at its limit the entry that was not used for longest goes.
///
/// Looking up, using and inserting are O(1), amortised: the queue is put in order when it is looked
/// at. It holds at most twice as many records as there are entries.
#[derive(Debug)]
pub(crate) struct Aging<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// Oldest first, by what was known when the record was written.
    queue: VecDeque<Record<K>>,
    limit: usize,
    next_id: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    used: Instant,
    id: u64,
}

#[derive(Debug)]
struct Record<K> {
    key: K,
    used: Instant,
    id: u64,
}

impl<K: Clone + Eq + Hash, V> Aging<K, V> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), queue: VecDeque::new(), limit: limit.max(1), next_id: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Uses an entry.
    pub(crate) fn touch<Q>(&mut self, key: &Q, now: Instant) -> Option<&mut V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let entry = self.entries.get_mut(key)?;
        entry.used = now;
        Some(&mut entry.value)
    }

    /// An entry and how long ago it was used, without using it.
    pub(crate) fn peek<Q>(&self, key: &Q, now: Instant) -> Option<(&V, Duration)>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let entry = self.entries.get(key)?;
        Some((&entry.value, now.saturating_duration_since(entry.used)))
    }

    /// Adds or replaces an entry; returns the one that had to go for it.
    pub(crate) fn insert(&mut self, key: K, value: V, now: Instant) -> Option<(K, V)> {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.used = now;
            entry.value = value;
            return None;
        }
        let evicted = if self.entries.len() >= self.limit { self.pop_oldest() } else { None };
        let id = self.next_id;
        self.next_id += 1;
        self.entries.insert(key.clone(), Entry { value, used: now, id });
        self.queue.push_back(Record { key, used: now, id });
        if self.queue.len() > 2 * self.entries.len() + 16 {
            self.queue.retain(|it| self.entries.get(&it.key).is_some_and(|e| e.id == it.id));
        }
        evicted
    }

    pub(crate) fn remove<Q>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.entries.remove(key).map(|entry| entry.value)
    }

    /// Removes the entries that were last used longer ago than `age`.
    pub(crate) fn expire(&mut self, age: Duration, now: Instant) {
        while let Some(front) = self.queue.front() {
            if now.saturating_duration_since(front.used) <= age {
                return;
            }
            let Some(record) = self.queue.pop_front() else { return };
            let Some(entry) = self.entries.get(&record.key).filter(|it| it.id == record.id) else {
                continue;
            };
            if now.saturating_duration_since(entry.used) > age {
                self.entries.remove(&record.key);
            } else {
                self.queue.push_back(Record { used: entry.used, ..record });
            }
        }
    }

    /// Removes every entry for which `goes` says so; returns how many.
    pub(crate) fn remove_if(&mut self, mut goes: impl FnMut(&K, &V) -> bool) -> usize {
        let before = self.entries.len();
        self.entries.retain(|key, entry| !goes(key, &entry.value));
        before - self.entries.len()
    }

    fn pop_oldest(&mut self) -> Option<(K, V)> {
        while let Some(record) = self.queue.pop_front() {
            let Some(entry) = self.entries.get(&record.key).filter(|it| it.id == record.id) else {
                continue;
            };
            if entry.used > record.used {
                self.queue.push_back(Record { used: entry.used, ..record });
                continue;
            }
            let entry = self.entries.remove(&record.key)?;
            return Some((record.key, entry.value));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_that_was_not_used_for_longest_goes() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut map = Aging::new(3);
        for key in 0..3_u64 {
            assert_eq!(map.insert(key, key * 10, at(key)), None);
        }
        assert_eq!(map.touch(&0, at(5)), Some(&mut 0));
        assert_eq!(map.insert(3, 30, at(6)), Some((1, 10)));
        assert_eq!(map.insert(4, 40, at(7)), Some((2, 20)));
        assert_eq!(map.insert(5, 50, at(8)), Some((0, 0)));
        assert_eq!((map.len(), map.peek(&3, at(9))), (3, Some((&30, Duration::from_secs(3)))));
    }

    #[test]
    fn old_entries_expire_and_records_do_not_pile_up() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut map = Aging::new(100);
        for round in 0..1000_u64 {
            map.insert(7, round, at(round));
            map.remove(&7);
            assert!(map.queue.len() < 64, "{}", map.queue.len());
        }
        map.insert(1, 1, at(1000));
        map.insert(2, 2, at(1001));
        map.touch(&1, at(1010));
        map.expire(Duration::from_secs(5), at(1011));
        assert_eq!((map.len(), map.peek(&1, at(1011)).is_some()), (1, true));
        assert_eq!(map.remove_if(|key, _| *key == 1), 1);
    }
}
