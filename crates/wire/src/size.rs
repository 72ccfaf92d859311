//! Sizes, rates and durations as people write them, and back.
//!
//! Sizes take k, M, G, T (powers of 1024) and Ki, Mi, Gi, Ti; rates take kbit, Mbit, Gbit per second;
//! durations take ms, s, m, h.

use crate::error::{ErrorKind, WireError};

fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text.split_at(end)
}

fn scaled(number: &str, factor: f64, text: &str, form: &str) -> Result<u64, WireError> {
    let bad = || WireError::new(ErrorKind::InvalidInput, format!("read {text:?}: {form}"));
    let value: f64 = number.parse().map_err(|_| bad())?;
    let scaled = value * factor;
    // Beyond 2^63 a float no longer holds what was written, and nothing is that large.
    if !scaled.is_finite() || !(0.0..9.0e18).contains(&scaled) {
        return Err(bad());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    Ok(scaled.round() as u64)
}

/// `10G`, `512Mi`, `4096`: bytes.
pub fn parse_bytes(text: &str) -> Result<u64, WireError> {
    let form = "a size is a number with k, M, G, T (powers of 1024) or Ki, Mi, Gi, Ti";
    let (number, unit) = split(text.trim());
    let factor = match unit.trim_end_matches('B').trim_end_matches('i') {
        "" => 1u64,
        "k" | "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err(WireError::new(ErrorKind::InvalidInput, format!("read {text:?}: {form}"))),
    };
    scaled(number, factor as f64, text, form)
}

/// `100Mbit`, `1Gbit`: bytes per second.
pub fn parse_rate_bytes_s(text: &str) -> Result<u64, WireError> {
    let form = "a rate is a number with kbit, Mbit or Gbit per second";
    let (number, unit) = split(text.trim());
    let bits = match unit {
        "bit" => 1.0,
        "kbit" => 1e3,
        "Mbit" => 1e6,
        "Gbit" => 1e9,
        _ => return Err(WireError::new(ErrorKind::InvalidInput, format!("read {text:?}: {form}"))),
    };
    scaled(number, bits / 8.0, text, form)
}

/// `100ms`, `2s`, `5m`: milliseconds.
pub fn parse_ms(text: &str) -> Result<u64, WireError> {
    let form = "a duration is a number with ms, s, m or h";
    let (number, unit) = split(text.trim());
    let factor = match unit {
        "ms" => 1.0,
        "s" => 1e3,
        "m" => 6e4,
        "h" => 3.6e6,
        _ => return Err(WireError::new(ErrorKind::InvalidInput, format!("read {text:?}: {form}"))),
    };
    scaled(number, factor, text, form)
}

/// Bytes for people: three digits and a unit of 1024.
pub fn show_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 || unit == "TiB" {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    String::new()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_people_write() {
        for (text, bytes) in
            [("4096", 4096), ("10G", 10 << 30), ("1.5Gi", 3 << 29), ("512k", 512 << 10), ("2MiB", 2 << 20)]
        {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        assert_eq!(parse_rate_bytes_s("1Gbit").unwrap(), 125_000_000);
        assert_eq!(parse_ms("100ms").unwrap(), 100);
        assert_eq!(parse_ms("2m").unwrap(), 120_000);
        for bad in ["", "G", "10X", "-1G", "1e99T", "9999999999T"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert!(parse_rate_bytes_s("10G").is_err());
    }

    #[test]
    fn what_people_read() {
        assert_eq!(show_bytes(12), "12 B");
        assert_eq!(show_bytes(3 << 29), "1.5 GiB");
    }
}
