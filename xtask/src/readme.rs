//! `cargo xtask readme`: the speed table of README.md, one line an op, and docs/speed.md with every case, from the last full run on a GPU.
//! Above the table stands a line for each kind of GPU that has a record.

use crate::{Failure, Result, fail, shell};
use serde_json::Value;
use std::collections::BTreeMap;

const BEGIN: &str = "<!-- ops:begin -->";
const END: &str = "<!-- ops:end -->";

/// Names that the benchmark of the peers gives their releases, and what the table calls them.
const PEERS: [(&str, &str); 2] = [("v1", "TileKernels 1.0.0"), ("v2", "TileKernels 2.1.0")];

/// The last full run on each kind of GPU. The tables are of the first one.
const RECORDS: [&str; 2] = ["tests/gpu/h200.jsonl", "tests/gpu/h100.jsonl"];

fn records() -> Result<Vec<Record>> {
    RECORDS.iter().map(|name| Record::parse(name, &shell::read(&shell::root().join(name))?)).collect()
}

/// A page and what makes its table.
type Page = (&'static str, fn(&[Record]) -> String);

const PAGES: [Page; 2] = [("README.md", summary), ("docs/speed.md", table)];

/// `cargo xtask readme`.
pub fn run() -> Result {
    let records = records()?;
    for (page, table) in PAGES {
        let path = shell::root().join(page);
        let fresh = with_table(page, &shell::read(&path)?, &table(&records))?;
        println!("{page}: {}", if shell::write(&path, &fresh)? { "table written" } else { "the table was current" });
    }
    Ok(())
}

/// For `tidy`: a problem for each table that is not what the record gives.
pub fn out_of_date() -> Result<Vec<String>> {
    let records = records()?;
    let mut problems = Vec::new();
    for (page, table) in PAGES {
        let text = shell::read(&shell::root().join(page))?;
        if with_table(page, &text, &table(&records))? != text {
            problems.push(format!("{page}: the speed table is not that of tests/gpu; type: cargo xtask readme"));
        }
    }
    Ok(problems)
}

/// The page with the text between the marks replaced.
fn with_table(name: &str, page: &str, table: &str) -> Result<String> {
    let parts = page.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    match parts {
        Some((before, after)) => Ok(format!("{before}{BEGIN}\n{table}{END}{after}")),
        None => fail(format!("{name}: the marks {BEGIN} and {END} are missing")),
    }
}

/// A case of ours.
struct Row {
    op: String,
    case: String,
    us: f64,
    gbs: Option<f64>,
    /// What the peers take, in the order of [`PEERS`].
    peers: [Option<f64>; 2],
}

impl Row {
    /// Our time by that of the faster peer.
    fn ratio(&self) -> Option<f64> {
        self.peers.iter().flatten().copied().reduce(f64::min).map(|fastest| self.us / fastest)
    }
}

/// A run.
struct Record {
    /// The GPU and its driver.
    device: String,
    /// What that machine can do.
    limits: String,
    /// By op, cases in the order of the run.
    rows: Vec<Row>,
}

impl Record {
    /// From JSON lines `{op, case, us, gbs, device, driver, ptx_sha}` and the peers' `{peer, op, case, us, gbs}`.
    fn parse(name: &str, jsonl: &str) -> Result<Self> {
        let mut ours: Vec<Row> = Vec::new();
        let mut peers: BTreeMap<(String, String, String), f64> = BTreeMap::new();
        let mut device = String::new();
        // What the machine itself can do stands above the table, not in it.
        let mut limits = String::new();
        for (i, line) in jsonl.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let json: Value = serde_json::from_str(line).map_err(|e| Failure(format!("{name}:{}: {e}", i + 1)))?;
            let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
            let (op, case) = (text("op"), text("case"));
            // A case that failed has an error in place of a time.
            let Some(us) = json["us"].as_f64() else { continue };
            match json["peer"].as_str() {
                Some(peer) => {
                    peers.insert((peer.to_owned(), op, case), us);
                }
                None => {
                    if device.is_empty() && !text("device").is_empty() {
                        device = format!("{}, driver {}", text("device"), text("driver"));
                    }
                    match (op.as_str(), json["gbs"].as_f64()) {
                        ("events", _) => {
                            limits.push_str(&format!(" An empty pair of events reads {us:.2}."));
                            continue;
                        }
                        ("copy", Some(gbs)) => {
                            limits.push_str(&format!(" Copying 1 GiB on the device: {gbs:.0} GB/s."));
                            continue;
                        }
                        _ => {}
                    }
                    // A later line of the same case replaces the earlier one.
                    ours.retain(|old| (&old.op, &old.case) != (&op, &case));
                    ours.push(Row { op, case, us, gbs: json["gbs"].as_f64(), peers: [None; 2] });
                }
            }
        }
        for row in &mut ours {
            row.peers = PEERS.map(|(peer, _)| peers.get(&(peer.to_owned(), row.op.clone(), row.case.clone())).copied());
        }
        ours.sort_by(|a, b| a.op.cmp(&b.op));
        Ok(Self { device, limits, rows: ours })
    }

    /// How many cases a peer has, and the geometric mean of our time by that of the faster one.
    fn mean(&self) -> Option<(usize, f64)> {
        mean(self.rows.iter())
    }
}

/// The same of some rows.
fn mean<'a>(rows: impl Iterator<Item = &'a Row>) -> Option<(usize, f64)> {
    let ratios: Vec<f64> = rows.filter_map(Row::ratio).collect();
    if ratios.is_empty() {
        return None;
    }
    Some((ratios.len(), (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp()))
}

/// What stands above a table.
fn head(records: &[Record]) -> String {
    let mut head = String::new();
    for record in records {
        if let Some((cases, mean)) = record.mean() {
            head.push_str(&format!(
                "- {}: {mean:.2} of the faster peer's time, the geometric mean of {cases} cases.{}\n",
                record.device, record.limits
            ));
        }
    }
    let device = records.first().map_or("", |record| &record.device);
    let method = "ours and both peers on the same GPU, by the same method. Ratio: ours to the faster peer.";
    format!("{head}\nMicroseconds on {device}; {method}\n\n")
}

/// Rows about launches rather than kernels.
const LAUNCHES: [&str; 4] =
    ["first_launch", "host_time_of_a_launch", "host_time_of_the_driver_call", "host_time_of_the_launcher"];

fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
}

/// The first cells of a row. A bar in a cell would end it.
fn start(row: &Row) -> String {
    format!("| `{}` | {} | {:.2} | {} |", row.op, row.case.replace('|', "\\|"), row.us, cell(row.gbs, 0))
}

fn peers_cells(row: &Row) -> String {
    row.peers.iter().map(|time| format!(" {} |", cell(*time, 2))).collect()
}

fn peers_heads() -> String {
    PEERS.iter().map(|(_, name)| format!(" {name} |")).collect()
}

/// A line an op: its largest case that a peer has, and the ratios over all of those.
fn summary(records: &[Record]) -> String {
    let [record, ..] = records else { return String::new() };
    let mut table = head(records);
    table.push_str(&format!("| op | largest case of the peers | ferrotile | GB/s |{} cases | ratio | worst |\n", peers_heads()));
    table.push_str("|---|---|---:|---:|---:|---:|---:|---:|---:|\n");
    let mut alone = Vec::new();
    for rows in record.rows.chunk_by(|a, b| a.op == b.op).filter(|rows| !LAUNCHES.contains(&rows[0].op.as_str())) {
        let largest = rows.iter().filter(|row| row.ratio().is_some()).max_by(|a, b| a.us.total_cmp(&b.us));
        let (Some(largest), Some((cases, mean))) = (largest, mean(rows.iter())) else {
            alone.push(format!("`{}`", rows[0].op));
            continue;
        };
        let worst = rows.iter().filter_map(Row::ratio).reduce(f64::max);
        let cells = format!(" {cases} | {mean:.2} | {} |\n", cell(worst, 2));
        table.push_str(&(start(largest) + &peers_cells(largest) + &cells));
    }
    if !alone.is_empty() {
        table.push_str(&format!("\nOf {} the peers have nothing that was timed.\n", alone.join(", ")));
    }
    table
}

/// Every case.
fn table(records: &[Record]) -> String {
    let [record, ..] = records else { return String::new() };
    let mut table = head(records);
    let (beside, alone): (Vec<&Row>, Vec<&Row>) = record.rows.iter().partition(|row| row.ratio().is_some());
    if !beside.is_empty() {
        table.push_str(&format!(
            "| op | case | ferrotile | GB/s |{} ratio |\n|---|---|---:|---:|---:|---:|---:|\n",
            peers_heads()
        ));
    }
    for row in beside {
        table.push_str(&(start(row) + &peers_cells(row) + &format!(" {} |\n", cell(row.ratio(), 2))));
    }
    if !alone.is_empty() {
        let summary = format!("{} cases that the peers' run does not have", alone.len());
        table.push_str(&format!(
            "\n<details><summary>{summary}</summary>\n\n| op | case | ferrotile | GB/s |\n|---|---|---:|---:|\n"
        ));
        alone.into_iter().for_each(|row| table.push_str(&(start(row) + "\n")));
        table.push_str("\n</details>\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"{"op":"topk_gate","case":"t=1","us":4.0,"gbs":10,"device":"H100","driver":"580","ptx_sha":"00"}
{"op":"cast","case":"t=2","us":99.0,"gbs":1.0,"device":"H100","driver":"580","ptx_sha":"00"}
{"op":"cast","case":"t=2","us":60.0,"gbs":2700.4,"device":"H100","driver":"580","ptx_sha":"00"}
{"op":"events","case":"","us":1.28,"device":"H100","driver":"580"}
{"op":"copy","case":"bytes=1GiB","us":714.2,"gbs":3007.1,"device":"H100","driver":"580"}
{"op":"alone","case":"","us":1.5,"device":"H100","driver":"580","ptx_sha":"00"}

{"peer":"v1","op":"cast","case":"t=2","us":64.0,"gbs":2000}
{"peer":"v2","op":"cast","case":"t=2","us":80.0,"gbs":2000}
{"peer":"v2","op":"topk_gate","case":"t=1","us":10.0,"gbs":2000}
{"peer":"v1","op":"topk_gate","case":"t=1","error":"no"}
{"peer":"copy","op":"copy","case":"bytes=1GiB","us":714.24,"gbs":3007}
"#;

    #[test]
    fn the_table_has_ours_beside_the_peers() {
        let expected = "- H100, driver 580: 0.61 of the faster peer's time, the geometric mean of 2 cases. An empty pair of events reads 1.28. Copying 1 GiB on the device: 3007 GB/s.

Microseconds on H100, driver 580; ours and both peers on the same GPU, by the same method. Ratio: ours to the faster peer.

| op | case | ferrotile | GB/s | TileKernels 1.0.0 | TileKernels 2.1.0 | ratio |
|---|---|---:|---:|---:|---:|---:|
| `cast` | t=2 | 60.00 | 2700 | 64.00 | 80.00 | 0.94 |
| `topk_gate` | t=1 | 4.00 | 10 | – | 10.00 | 0.40 |

<details><summary>1 cases that the peers' run does not have</summary>

| op | case | ferrotile | GB/s |
|---|---|---:|---:|
| `alone` |  | 1.50 | – |

</details>
";
        assert_eq!(table(&[Record::parse("a", LINES).unwrap()]), expected);
        assert!(Record::parse("a", "{\n").is_err());
    }

    #[test]
    fn the_summary_has_a_line_for_each_op() {
        let lines = format!(
            "{LINES}{}\n{}\n",
            r#"{"op":"cast","case":"t=3","us":10.0,"gbs":5}"#, r#"{"peer":"v2","op":"cast","case":"t=3","us":9.0}"#
        );
        let summary = summary(&[Record::parse("a", &lines).unwrap()]);
        let expected = "| op | largest case of the peers | ferrotile | GB/s | TileKernels 1.0.0 | TileKernels 2.1.0 | cases | ratio | worst |
|---|---|---:|---:|---:|---:|---:|---:|---:|
| `cast` | t=2 | 60.00 | 2700 | 64.00 | 80.00 | 2 | 1.02 | 1.11 |
| `topk_gate` | t=1 | 4.00 | 10 | – | 10.00 | 1 | 0.40 | 0.40 |

Of `alone` the peers have nothing that was timed.
";
        assert_eq!(summary.split_once("peer.\n\n").unwrap().1, expected);
    }

    #[test]
    fn only_the_part_between_the_marks_changes() {
        let page = format!("# A\n{BEGIN}\nold\n{END}\nrest\n");
        let once = with_table("A", &page, "new\n").unwrap();
        assert_eq!(once, format!("# A\n{BEGIN}\nnew\n{END}\nrest\n"));
        assert_eq!(with_table("A", &once, "new\n").unwrap(), once);
        assert!(with_table("A", "# A\n", "new\n").is_err());
    }
}
