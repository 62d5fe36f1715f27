//! Running an op's checks: one function per op, the same on the emulator and on a GPU.

use super::cases::Depth;
use ferrotile::Device;
use std::cell::Cell;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The checks of one op.
#[derive(Clone, Copy)]
pub struct Suite {
    /// Name of the op.
    pub op: &'static str,
    /// All its checks. The error text is complete: what differs, where, with which parameters.
    pub run: fn(&Ctx) -> Result<Report, String>,
}

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Cases compared.
    pub cases: u64,
    /// What a reader should know, such as data that were absent.
    pub notes: Vec<String>,
}

/// Which ops and cases a command line asks for: `OP` is any op whose name contains it, `=OP` that op alone; behind a colon, cases whose
/// name contains the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    op: String,
    exact: bool,
    case: Option<String>,
}

impl Filter {
    /// From the text of an argument.
    pub fn new(text: &str) -> Self {
        let (op, case) = text.split_once(':').map_or((text, None), |(op, case)| (op, Some(case)));
        let name = op.strip_prefix('=');
        Self { op: name.unwrap_or(op).to_owned(), exact: name.is_some(), case: case.map(str::to_owned) }
    }

    /// From all arguments.
    pub fn all(texts: &[String]) -> Vec<Self> {
        texts.iter().map(|text| Self::new(text)).collect()
    }

    /// Whether it chooses an op of this name, or some of its cases.
    pub fn op(&self, name: &str) -> bool {
        if self.exact { name == self.op } else { name.contains(&self.op) }
    }

    /// Whether it chooses a kernel, whose name is that of its op and more behind two underscores.
    pub fn entry(&self, name: &str) -> bool {
        if self.exact { name.split("__").next() == Some(self.op.as_str()) } else { name.contains(&self.op) }
    }

    /// Whether it chooses a row of the benchmark. Without equals sign and colon it may also be a part of `op case`.
    pub fn row(&self, op: &str, case: &str) -> bool {
        match &self.case {
            Some(part) => self.op(op) && case.contains(part.as_str()),
            None if self.exact => self.op(op),
            None => format!("{op} {case}").contains(&self.op),
        }
    }

    /// The part behind the colon.
    pub fn case(&self) -> Option<&str> {
        self.case.as_deref()
    }
}

/// Where and how much to check, and the count of what was checked.
pub struct Ctx {
    /// The device under test.
    pub device: Device,
    /// How much.
    pub depth: Depth,
    filters: Vec<String>,
    cases: Cell<u64>,
    on_case: Box<dyn Fn(&str)>,
}

impl Ctx {
    /// All cases of this depth.
    pub fn new(device: Device, depth: Depth) -> Self {
        Self { device, depth, filters: Vec::new(), cases: Cell::new(0), on_case: Box::new(|_| ()) }
    }

    /// Only cases whose name contains `filter`, or another one that was given before.
    pub fn with_filter(mut self, filter: &str) -> Self {
        self.filters.push(filter.to_owned());
        self
    }

    /// Call `f` with the name of each case that starts.
    pub fn on_case(mut self, f: impl Fn(&str) + 'static) -> Self {
        self.on_case = Box::new(f);
        self
    }

    /// Whether to run the case of this name, which spells its parameters (`fmt=e4m3,h=576,t=4001`). Counts it if so.
    ///
    /// ```text
    /// for (t, h) in shapes(ctx.depth, 1, 64) {
    ///     let name = format!("h={h},t={t}");
    ///     if ctx.case(&name) {
    ///         check(&ctx.device, t, h, &name)?;
    ///     }
    /// }
    /// Ok(ctx.report())
    /// ```
    pub fn case(&self, name: &str) -> bool {
        let chosen = self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter.as_str()));
        if chosen {
            self.cases.set(self.cases.get() + 1);
            (self.on_case)(name);
        }
        chosen
    }

    /// The number of cases so far, without notes.
    pub fn report(&self) -> Report {
        Report { cases: self.cases.get(), notes: Vec::new() }
    }
}

/// Any error as text, for `map_err` in a check.
pub fn text(error: impl Display) -> String {
    error.to_string()
}

/// Fail with a text unless the condition holds.
pub fn ensure(condition: bool, error: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(error()) }
}

/// A device by name: `emulator` (all checks on) or `cuda:N`.
pub fn device(name: &str) -> Result<Device, String> {
    let device = device_unchecked(name)?;
    Ok(if device.is_emulator() { device.checked() } else { device })
}

/// A device by name as its users have it: the emulator without checks.
pub fn device_unchecked(name: &str) -> Result<Device, String> {
    if name == "emulator" {
        return Ok(Device::emulator());
    }
    let ordinal = name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
    let ordinal = ordinal.ok_or_else(|| format!("device {name} is neither `emulator` nor `cuda:N`"))?;
    Device::cuda(ordinal).map_err(text)
}

/// SHA-256 of an op's PTX in this program, as its manifest has it; `None` if the op has none.
pub fn ptx_sha(op: &str) -> Option<String> {
    // The PTX of the device layer's own kernels is not in the published crate.
    let manifest = if op == "selftest" { include_str!("../../ptx/manifest.json") } else { ferrotile::PTX_MANIFEST };
    let manifest: serde_json::Value = serde_json::from_str(manifest).ok()?;
    Some(manifest["ops"][op]["sha256"].as_str()?.to_owned())
}

impl Suite {
    /// Run, and make a panic of the check an error like any other.
    pub fn check(&self, ctx: &Ctx) -> Result<Report, String> {
        let report = catch_unwind(AssertUnwindSafe(|| (self.run)(ctx))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("panicked: {}", text.unwrap_or("no text")))
        })?;
        // A check that compared nothing has not passed.
        ensure(report.cases > 0, || "no case was checked".to_owned())?;
        Ok(report)
    }

    /// The body of the op's `#[test]`: the checked emulator with threads and blocks in ascending order and in a shuffled one, and the
    /// first GPU if this build can use one.
    pub fn test(&self) {
        let shuffled = Device::emulator().checked().shuffled(0x5EED);
        for (order, device) in [("ascending", Device::emulator().checked()), ("shuffled", shuffled)] {
            match self.check(&Ctx::new(device, Depth::Small)) {
                Ok(report) => report.notes.iter().for_each(|note| println!("{}: {note}", self.op)),
                Err(error) => panic!("{} on the emulator, {order} order: {error}", self.op),
            }
        }
        match Device::cuda_count() {
            Ok(n) if n > 0 => {
                let checked = Device::cuda(0).map_err(text).and_then(|device| self.check(&Ctx::new(device, Depth::Small)));
                if let Err(error) = checked {
                    panic!("{} on the GPU: {error}", self.op);
                }
            }
            _ => println!("{}: GPU: skipped", self.op),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ctx() -> Ctx {
        Ctx::new(Device::emulator(), Depth::Small)
    }

    #[test]
    fn cases_are_filtered_and_counted() {
        let names = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        let seen = names.clone();
        let ctx = ctx().with_filter("h=576").on_case(move |name| seen.borrow_mut().push(name.to_owned()));
        let ran: Vec<bool> = ["h=576,t=1", "h=384,t=1", "h=576,t=37"].iter().map(|n| ctx.case(n)).collect();
        assert_eq!(ran, [true, false, true]);
        assert_eq!(ctx.report().cases, 2);
        assert_eq!(*names.borrow(), ["h=576,t=1", "h=576,t=37"]);
        let ctx = self::ctx().with_filter("h=576,t=1").with_filter("h=384");
        assert_eq!(["h=576,t=1", "h=384,t=1", "h=576,t=37"].map(|n| ctx.case(n)), [true, true, false]);
    }

    #[test]
    fn filters_name_ops_exactly_or_in_part() {
        let chosen = |filter: &str| {
            let filter = Filter::new(filter);
            ["cast", "cast_back", "per_token_cast"].map(|op| filter.op(op))
        };
        assert_eq!(chosen(""), [true; 3]);
        assert_eq!(chosen("cast"), [true; 3]);
        assert_eq!(chosen("per"), [false, false, true]);
        assert_eq!(chosen("=cast"), [true, false, false]);
        assert_eq!(chosen("=per"), [false; 3]);
        assert_eq!(
            Filter::new("=cast:h=576,t=1"),
            Filter { op: "cast".to_owned(), exact: true, case: Some("h=576,t=1".to_owned()) }
        );
        assert_eq!(Filter::new("cast").case(), None);
        let row = |filter: &str| Filter::new(filter).row("cast", "h=7168,t=128");
        let filters = ["=cast", "=cast:t=128", "cas:t=128", "cast h=7168", "t=128", "=cas", "=cast:t=16", "cast t=128"];
        assert_eq!(filters.map(row), [true, true, true, true, true, false, false, false]);
        let entries = |filter: &str| ["cast__wide__f32_bf16", "cast_back__row"].map(|name| Filter::new(filter).entry(name));
        assert_eq!((entries("=cast"), entries("cast"), entries("row")), ([true, false], [true; 2], [false, true]));
    }

    #[test]
    fn errors_panics_and_empty_runs_fail() {
        let run = |run: fn(&Ctx) -> Result<Report, String>| Suite { op: "op", run }.check(&ctx());
        assert_eq!(run(|_| Err("differs".to_owned())).unwrap_err(), "differs");
        assert_eq!(run(|_| panic!("case {}", 3)).unwrap_err(), "panicked: case 3");
        assert_eq!(run(|ctx| Ok(ctx.report())).unwrap_err(), "no case was checked");
        let one = run(|ctx| {
            ctx.case("only");
            Ok(ctx.report())
        });
        assert_eq!(one, Ok(Report { cases: 1, notes: vec![] }));
    }

    #[test]
    fn devices_by_name() {
        assert!(device("emulator").unwrap().is_emulator());
        assert!(device("gpu").unwrap_err().contains("neither"));
        assert!(device("cuda:x").unwrap_err().contains("neither"));
    }
}
