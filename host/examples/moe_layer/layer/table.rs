//! The tables at the end.

use super::{BOUND, Report};
use std::fmt::{self, Display};

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = &self.load;
        writeln!(f, "{:<24}{:>10}{:>10}{:>10}", "expert", "rows", "dropped", "padding")?;
        for (i, expert) in load.experts.iter().enumerate() {
            writeln!(f, "{i:<24}{:>10}{:>10}{:>10}", expert.rows, expert.dropped, expert.padding)?;
        }
        let padding: u64 = load.experts.iter().map(|expert| expert.padding).sum();
        writeln!(f, "{:<24}{:>10}{:>10}{padding:>10}", "all", load.rows(), load.dropped())?;
        let (rows, needed) = (load.num_expanded_tokens, load.needed);
        writeln!(f, "{rows} rows, {needed} needed, {} unused\n", rows.saturating_sub(needed))?;

        let all: f64 = self.stages.iter().map(|(_, us)| us).sum();
        writeln!(f, "{:<24}{:>10}", "stage", "us")?;
        for (name, us) in self.stages.iter().chain([&("all", all)]) {
            writeln!(f, "{name:<24}{us:>10.1}")?;
        }
        writeln!(
            f,
            "\n{:<24}{:>10}  (largest difference by largest value; fine up to {BOUND:.0e})",
            "against a dense layer", "error"
        )?;
        self.errors.iter().try_for_each(|(name, error)| writeln!(f, "{name:<24}{error:>10.1e}"))
    }
}
