//! Addresses and prefixes as they are written in tests.

use std::net::IpAddr;

use ipnet::IpNet;

use super::LabError;

/// An address or a prefix: text such as `"10.0.0.1/24"` or `"fd41::1"`, or the parsed types.
///
/// An address without a length is a host prefix (/32, /128). Host bits are kept.
pub trait ToNet {
    /// The prefix.
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`] for text that is neither an address nor a prefix.
    fn to_net(&self) -> Result<IpNet, LabError>;
}

impl ToNet for IpNet {
    fn to_net(&self) -> Result<IpNet, LabError> {
        Ok(*self)
    }
}

impl ToNet for IpAddr {
    fn to_net(&self) -> Result<IpNet, LabError> {
        Ok(IpNet::from(*self))
    }
}

impl ToNet for str {
    fn to_net(&self) -> Result<IpNet, LabError> {
        self.parse::<IpNet>()
            .or_else(|_| self.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_unparsed| LabError::Parse { text: self.to_owned() })
    }
}

impl ToNet for String {
    fn to_net(&self) -> Result<IpNet, LabError> {
        self.as_str().to_net()
    }
}

impl<T: ToNet + ?Sized> ToNet for &T {
    fn to_net(&self) -> Result<IpNet, LabError> {
        (**self).to_net()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_length_is_a_host_prefix() {
        assert_eq!("10.0.0.1".to_net().unwrap().to_string(), "10.0.0.1/32");
        assert_eq!("fd41::1/64".to_net().unwrap().to_string(), "fd41::1/64");
        assert!(matches!("pod".to_net(), Err(LabError::Parse { .. })));
    }
}
