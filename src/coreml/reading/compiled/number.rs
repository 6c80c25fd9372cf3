//! Numbers of a program's text.

use anyhow::{Context, Result, bail, ensure};

/// A float as C's `%a` prints it: `-0x1.8p-3`, `0x0p+0`, `inf`. Every digit counts: one that a double does not hold is
/// refused.
pub fn real(text: &str) -> Result<f64> {
    let read = || -> Option<f64> {
        let (negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let sign = if negative { -1.0 } else { 1.0 };
        if digits == "inf" {
            return Some(sign * f64::INFINITY);
        }
        let (mantissa, exponent) = digits.strip_prefix("0x")?.split_once('p')?;
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let exponent: i32 = exponent.parse().ok()?;
        if !(-1074..=1023).contains(&exponent) || fraction.len() > 13 || mantissa.ends_with('.') {
            return None;
        }
        let digits = fraction.chars().map(|digit| digit.to_digit(16)).collect::<Option<Vec<u32>>>()?;
        let whole = match whole {
            "0" if digits.is_empty() && exponent == 0 => return Some(sign * 0.0),
            "1" => 1u64,
            _ => return None,
        };
        let bits = digits.iter().fold(whole, |bits, &digit| bits << 4 | u64::from(digit));
        // Both steps are exact: at most 53 bits, and a power of two in two halves.
        let shift = exponent - 4 * digits.len() as i32;
        let (first, second) = (shift / 2, shift - shift / 2);
        let value = bits as f64 * 2f64.powi(first) * 2f64.powi(second);
        let kept = value / 2f64.powi(second) / 2f64.powi(first) == bits as f64;
        kept.then_some(sign * value)
    };
    read().with_context(|| format!("`{text:.40}` is not a valid float"))
}

/// A decimal integer.
pub fn integer(text: &str) -> Result<i128> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = !digits.is_empty() && digits.len() <= 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    ensure!(plain && (digits == "0" || !digits.starts_with('0')), "`{text:.40}` is not a valid integer");
    match text.parse() {
        Ok(integer) => Ok(integer),
        Err(_) => bail!("`{text:.40}` is not a valid integer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_read_to_the_last_bit() {
        let cases = [
            ("0x1p+0", 1.0),
            ("-0x1p+0", -1.0),
            ("0x0p+0", 0.0),
            ("0x1.8p-3", 0.1875),
            ("0x1p-24", 2f64.powi(-24)),
            ("0x1.fffffep+127", f64::from(f32::MAX)),
            ("0x1.fffffffffffffp+1023", f64::MAX),
            ("0x1p-1074", f64::from_bits(1)),
            ("0x1p-149", f64::from(f32::from_bits(1))),
            ("inf", f64::INFINITY),
            ("-inf", f64::NEG_INFINITY),
        ];
        for (text, value) in cases {
            assert_eq!(real(text).unwrap(), value, "{text}");
        }
        assert!(real("-0x0p+0").unwrap().is_sign_negative());
        let broken = [
            "",
            "-",
            "0x",
            "0x1",
            "0x1p",
            "1p+0",
            "0x2p+0",
            "0x1.p+0",
            "0x1.gp+0",
            "0x1p+1024",
            "0x1p-1075",
            "nan",
            "1.5",
            "0x1.00000000000001p+0",
            "0x1p+99999999999",
            "--0x1p+0",
            "0x0p+1",
            "0x1.8p-1074",
            "infinity",
        ];
        for text in broken {
            assert!(real(text).is_err(), "{text}");
        }
    }

    #[test]
    fn integers_are_decimal_and_in_one_form() {
        assert_eq!((integer("0").unwrap(), integer("-12").unwrap()), (0, -12));
        assert_eq!(integer("18446744073709551615").unwrap(), i128::from(u64::MAX));
        for text in ["", "-", "01", "0x1", "1.0", "999999999999999999999", "+1", "-00"] {
            assert!(integer(text).is_err(), "{text}");
        }
    }
}
