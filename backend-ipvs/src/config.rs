//! Settings of the IPVS mode.

use std::{sync::Arc, time::Duration};

use ipnet::IpNet;

use crate::mark;

/// Longest name of the table.
// KERNEL: NFT_NAME_MAXLEN is 256; 28 keeps names readable everywhere.
const MAX_TABLE_BYTES: usize = 28;
/// Longest name of a link.
// KERNEL: IFNAMSIZ less the NUL (include/uapi/linux/if.h, v6.12).
const MAX_LINK_BYTES: usize = 15;

/// The schedulers of Linux.
pub const SCHEDULERS: [&str; 14] =
    ["dh", "fo", "lblc", "lblcr", "lc", "mh", "nq", "ovf", "rr", "sed", "sh", "twos", "wlc", "wrr"];

/// Settings of the IPVS mode; built by struct update from [`Config::default`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// The scheduler of Services that do not name one: one of [`SCHEDULERS`].
    pub scheduler: Arc<str>,
    /// The nf_tables table, one per family: 1 to 28 ASCII letters, digits, `-` and `_`.
    pub table: String,
    /// The dummy link that holds the addresses of Services: 1 to 15 ASCII letters, digits, `-` and
    /// `_`.
    pub link: String,
    /// The bit of the connection mark that says "masquerade this": 0 to 31.
    pub masquerade_bit: u8,
    /// The bit of the connection mark that says "through a virtual server of ours": 0 to 31, another.
    pub proxied_bit: u8,
    /// Where marks that lead to virtual servers begin: a multiple of 2²¹, and not zero.
    pub mark_base: u32,
    /// How long connections to an endpoint that is gone may go on; `None` for as long as they like.
    pub drain: Option<Duration>,
    /// Virtual servers at these addresses are never removed.
    pub exclude: Vec<IpNet>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            scheduler: "rr".into(),
            table: "proxier-ipvs".to_owned(),
            link: "proxier-ipvs0".to_owned(),
            masquerade_bit: 14,
            proxied_bit: 15,
            mark_base: 0x5000_0000,
            drain: None,
            exclude: Vec::new(),
        }
    }
}

impl Config {
    /// Checks the settings.
    ///
    /// # Errors
    /// [`ConfigError`] names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let legal = |name: &str, most: usize| {
            (1..=most).contains(&name.len())
                && name.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_".contains(&it))
        };
        if !legal(&self.table, MAX_TABLE_BYTES) {
            return Err(ConfigError::Table { table: self.table.clone() });
        }
        if !legal(&self.link, MAX_LINK_BYTES) {
            return Err(ConfigError::Link { link: self.link.clone() });
        }
        for bit in [self.masquerade_bit, self.proxied_bit] {
            if bit > 31 {
                return Err(ConfigError::MarkBit { bit });
            }
        }
        if self.masquerade_bit == self.proxied_bit {
            return Err(ConfigError::SameBit { bit: self.masquerade_bit });
        }
        let base = self.mark_base;
        let taken = 1_u32.wrapping_shl(self.masquerade_bit.into());
        if base == 0 || !mark::is_ours(base, base) || base & taken != 0 {
            return Err(ConfigError::MarkBase { base });
        }
        if !SCHEDULERS.contains(&&*self.scheduler) {
            return Err(ConfigError::Scheduler { scheduler: self.scheduler.to_string() });
        }
        Ok(())
    }

    /// The bits of the connection mark: masquerade, proxied.
    pub(crate) fn bits(&self) -> (u32, u32) {
        let bit = |bit: u8| 1_u32.wrapping_shl(bit.into());
        (bit(self.masquerade_bit), bit(self.proxied_bit))
    }
}

/// A setting is out of range.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Links cannot be called so.
    #[error(
        "link name {link:?}: expected 1 to {MAX_LINK_BYTES} ASCII letters, digits, '-' and '_'"
    )]
    Link {
        /// The setting.
        link: String,
    },
    /// Marks cannot begin there.
    #[error(
        "mark base {base:#x}: expected a multiple of 0x200000, not 0, without the masquerade bit"
    )]
    MarkBase {
        /// The setting.
        base: u32,
    },
    /// There is no such bit.
    #[error("mark bit {bit}: a mark has bits 0 to 31")]
    MarkBit {
        /// The setting.
        bit: u8,
    },
    /// One bit cannot say two things.
    #[error("mark bit {bit} is both the masquerade bit and the proxied bit")]
    SameBit {
        /// The setting.
        bit: u8,
    },
    /// Linux has no such scheduler.
    #[error("scheduler {scheduler:?}: expected one of {}", SCHEDULERS.join(", "))]
    Scheduler {
        /// The setting.
        scheduler: String,
    },
    /// Tables cannot be called so.
    #[error(
        "table name {table:?}: expected 1 to {MAX_TABLE_BYTES} ASCII letters, digits, '-' and '_'"
    )]
    Table {
        /// The setting.
        table: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_named() {
        assert_eq!(Config::default().validate(), Ok(()));
        let refused = |change: fn(&mut Config), expected: &str| {
            let mut config = Config::default();
            change(&mut config);
            let text = config.validate().map_err(|error| error.to_string());
            assert!(text.as_ref().is_err_and(|it| it.contains(expected)), "{text:?}");
        };
        refused(|it| it.table = "a b".to_owned(), "table name \"a b\"");
        refused(|it| it.link = "much-too-long-a-name".to_owned(), "link name");
        refused(|it| it.masquerade_bit = 32, "mark bit 32");
        refused(|it| it.proxied_bit = 14, "both the masquerade bit");
        refused(|it| it.mark_base = 0x5000_1000, "mark base 0x50001000");
        refused(|it| it.scheduler = "best".into(), "scheduler \"best\": expected one of dh, fo");
    }
}
