//! Settings of the iptables mode.

/// Longest prefix: `KUBE-SVC-` and its sixteen characters of hash leave 28 - 21 bytes for it.
// KERNEL: XT_EXTENSION_MAXNAMELEN is 29 with the NUL (include/uapi/linux/netfilter/x_tables.h,
// v6.12); iptables refuses longer chain names.
const MAX_PREFIX_BYTES: usize = 7;

/// Settings of the iptables mode.
///
/// Built by struct update from [`Config::default`], or with the methods of the same names.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// What the names of all chains begin with, without the hyphen: 1 to 7 ASCII letters and digits.
    /// Two proxiers with different prefixes can share a network namespace.
    pub prefix: String,
    /// Which bit of the packet mark says "masquerade": 0 to 31.
    pub masquerade_bit: u8,
    /// Drop forwarded packets that connection tracking calls INVALID.
    ///
    /// A late packet of a translated flow would reach the client with the wrong address and make it
    /// reset the connection. Switch it off where `net.netfilter.nf_conntrack_tcp_be_liberal` is set;
    /// [`probe`](crate::probe()) reads it.
    pub drop_invalid: bool,
    /// Pick masqueraded source ports at random, so that connections made at once do not collide.
    pub random_fully: bool,
    /// Take over chains that another proxier made, instead of refusing to start.
    pub takeover: bool,
    /// Write comments as matches, as kube-proxy does, instead of keeping them with the rule.
    ///
    /// `iptables -S` lists both; without this it lists a rule's comment behind its other matches. A
    /// table of 5,000 Services with 10 endpoints each takes 1.3 times as long to load with it, and
    /// 1.4 times as long to change.
    pub exact: bool,
    /// How chains lead from an address to its Service.
    pub layout: Layout,
}

/// How chains lead from an address to its Service, and on to an endpoint.
///
/// `iptables -S` lists either, the chains of a Service port have the same names, and one can be
/// changed for the other at a restart: only differences are written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Layout {
    /// By four bits of the address, or five of the node port, at a time, and to one of many endpoints
    /// by way of a part of them: the cost of a connection does not grow with the Services, and little
    /// with the endpoints.
    #[default]
    Tree,
    /// Exactly kube-proxy's: one list of all Services, and one of a Service's endpoints.
    KubeProxy,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            prefix: "KUBE".to_owned(),
            masquerade_bit: 14,
            drop_invalid: true,
            random_fully: true,
            takeover: false,
            exact: false,
            layout: Layout::Tree,
        }
    }
}

impl Config {
    /// Sets what the names of all chains begin with.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets which bit of the packet mark says "masquerade".
    #[must_use]
    pub const fn masquerade_bit(mut self, bit: u8) -> Self {
        self.masquerade_bit = bit;
        self
    }

    /// Sets whether INVALID packets are dropped when forwarded.
    #[must_use]
    pub const fn drop_invalid(mut self, drop: bool) -> Self {
        self.drop_invalid = drop;
        self
    }

    /// Sets whether masqueraded source ports are picked at random.
    #[must_use]
    pub const fn random_fully(mut self, random: bool) -> Self {
        self.random_fully = random;
        self
    }

    /// Sets whether chains of another proxier are taken over.
    #[must_use]
    pub const fn takeover(mut self, takeover: bool) -> Self {
        self.takeover = takeover;
        self
    }

    /// Sets whether comments are matches.
    #[must_use]
    pub const fn exact(mut self, exact: bool) -> Self {
        self.exact = exact;
        self
    }

    /// Sets how chains lead from an address to its Service.
    #[must_use]
    pub const fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`ConfigError`] names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let prefix = &self.prefix;
        let fits = (1..=MAX_PREFIX_BYTES).contains(&prefix.len());
        if !fits || !prefix.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(ConfigError::Prefix { prefix: prefix.clone() });
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
    /// Chain names cannot begin so.
    #[error("chain prefix {prefix:?}: expected 1 to {MAX_PREFIX_BYTES} ASCII letters and digits")]
    Prefix {
        /// The setting.
        prefix: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_named() {
        assert_eq!(Config::default().validate(), Ok(()));
        assert_eq!(Config::default().mark(), 0x4000);
        for prefix in ["", "KUBEPROX", "KU-BE", "KÜBE"] {
            let error = Config::default().prefix(prefix).validate().unwrap_err();
            assert!(error.to_string().contains(prefix), "{error}");
        }
        let error = Config::default().masquerade_bit(32).validate().unwrap_err();
        assert_eq!(error.to_string(), "masquerade bit 32: a packet mark has bits 0 to 31");
    }
}
