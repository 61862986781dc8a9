//! Settings of the nftables mode.

use proxier_core::capture_bit;

/// Longest name of a table; what follows it in messages stays readable.
const MAX_TABLE_BYTES: usize = 28;

/// Settings of the nftables mode.
///
/// Built by struct update from [`Config::default`], or with the methods of the same names.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// The name of the table in each family: a letter, then letters, digits and hyphens, up to 28.
    /// Two proxiers with different tables can share a network namespace.
    pub table: String,
    /// Which bit of the packet mark says "masquerade": 0 to 31.
    pub masquerade_bit: u8,
    /// Replace a table of that name that somebody else made, instead of refusing to start.
    pub takeover: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { table: "proxier".to_owned(), masquerade_bit: 14, takeover: false }
    }
}

impl Config {
    /// Sets the name of the table.
    #[must_use]
    pub fn table(mut self, table: impl Into<String>) -> Self {
        self.table = table.into();
        self
    }

    /// Sets which bit of the packet mark says "masquerade".
    #[must_use]
    pub const fn masquerade_bit(mut self, bit: u8) -> Self {
        self.masquerade_bit = bit;
        self
    }

    /// Sets whether somebody else's table of that name is replaced.
    #[must_use]
    pub const fn takeover(mut self, takeover: bool) -> Self {
        self.takeover = takeover;
        self
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`ConfigError`] names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let table = &self.table;
        let letter_first = table.starts_with(|first: char| first.is_ascii_alphabetic());
        let fits = table.len() <= MAX_TABLE_BYTES;
        let plain = table.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !letter_first || !fits || !plain {
            return Err(ConfigError::Table { table: table.clone() });
        }
        if self.masquerade_bit > 31 {
            return Err(ConfigError::MasqueradeBit { bit: self.masquerade_bit });
        }
        Ok(())
    }

    /// The packet mark that says "masquerade".
    pub(crate) const fn mark(&self) -> u32 {
        1_u32.wrapping_shl(self.masquerade_bit as u32)
    }

    /// The packet mark of what another mode has captured.
    pub(crate) fn captured(&self) -> u32 {
        1 << capture_bit(self.masquerade_bit)
    }
}

/// A setting is out of range.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no such bit.
    #[error("masquerade bit {bit}: a packet mark has bits 0 to 31")]
    MasqueradeBit {
        /// The setting.
        bit: u8,
    },
    /// A table cannot have this name.
    #[error(
        "table {table:?}: expected a letter, then letters, digits and hyphens, {MAX_TABLE_BYTES} in all"
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
        assert_eq!(Config::default().mark(), 0x4000);
        for table in ["", "7up", "a b", "a/b", "a-table-with-much-too-long-a-name"] {
            let error = Config::default().table(table).validate().unwrap_err();
            assert!(error.to_string().contains(table), "{error}");
        }
        let error = Config::default().masquerade_bit(32).validate().unwrap_err();
        assert_eq!(error.to_string(), "masquerade bit 32: a packet mark has bits 0 to 31");
    }
}
