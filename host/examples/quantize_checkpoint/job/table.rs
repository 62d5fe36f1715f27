//! The table at the end.

use super::{Outcome, Quality};
use indicatif::HumanBytes;
use std::fmt::{self, Display};

/// Prints a line for each tensor and one for all of them.
pub struct Table<'a>(pub &'a [Outcome]);

impl Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines =
            vec![["tensor", "shape", "type", "before", "after", "SNR dB", "max error", "throughput"].map(String::from)];
        let mut total = Quality::default();
        let (mut before, mut after) = (0, 0);
        for outcome in self.0 {
            before += outcome.source.bytes;
            after += outcome.bytes_after;
            total.add(&outcome.quality.unwrap_or_default());
            let t = &outcome.source;
            let first = [t.name.clone(), format!("{:?}", t.shape), t.dtype.clone()];
            lines.push(line(first, t.bytes, outcome.bytes_after, outcome.quality.as_ref()));
        }
        let quantised = self.0.iter().filter(|o| o.quality.is_some()).count();
        let first = ["total".to_owned(), format!("{quantised} of {} quantised", self.0.len()), String::new()];
        lines.push(line(first, before, after, (quantised > 0).then_some(&total)));

        let widths: [usize; 8] = std::array::from_fn(|i| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0));
        for cells in &lines {
            let padded = cells.iter().zip(widths).enumerate().map(|(i, (cell, width))| match i {
                0..=2 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            writeln!(f, "{}", padded.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// Cells of a line whose first three are given.
fn line([name, shape, dtype]: [String; 3], before: u64, after: u64, quality: Option<&Quality>) -> [String; 8] {
    let [snr, error, throughput] = match quality {
        None => ["copied", "", ""].map(String::from),
        Some(q) => {
            // Nothing lost, as with a matrix of zeros.
            let snr = if q.noise == 0.0 { "exact".to_owned() } else { format!("{:.2}", q.snr_db()) };
            [snr, format!("{:.3e}", q.max_error), rate(q)]
        }
    };
    [name, shape, dtype, HumanBytes(before).to_string(), HumanBytes(after).to_string(), snr, error, throughput]
}

/// Bytes that the quantising launches read and wrote, by the time they took on the device.
fn rate(q: &Quality) -> String {
    if q.micros == 0.0 {
        return "-".to_owned();
    }
    let gbs = q.bytes_moved as f64 / q.micros / 1e3;
    if gbs < 1.0 { format!("{:.1} MB/s", gbs * 1e3) } else { format!("{gbs:.1} GB/s") }
}
