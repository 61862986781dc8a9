//! Times as people read them.

/// Milliseconds.
pub(crate) fn ms(value: f64) -> String {
    us(value * 1e3)
}

/// Microseconds: three digits, and the unit that suits them.
pub(crate) fn us(value: f64) -> String {
    let (value, unit) = match value {
        ..1e3 => (value, "µs"),
        1e3..1e6 => (value / 1e3, "ms"),
        _ => (value / 1e6, "s"),
    };
    match value {
        ..10.0 => format!("{value:.2} {unit}"),
        10.0..100.0 => format!("{value:.1} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::us;

    #[test]
    fn times_have_three_digits() {
        let shown = [1.234, 15.04, 999.4, 1234.0, 2.5e6].map(us);
        assert_eq!(shown, ["1.23 µs", "15.0 µs", "999 µs", "1.23 ms", "2.50 s"]);
    }
}
