//! `cargo xtask readme`: the speed table of README.md, made from the last full run on a GPU.

use crate::{Failure, Result, fail, shell};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

const BEGIN: &str = "<!-- ops:begin -->";
const END: &str = "<!-- ops:end -->";

/// Names that the benchmark of the peers gives their releases, and what the table calls them.
const PEERS: [(&str, &str); 2] = [("v1", "TileKernels 1.0.0"), ("v2", "TileKernels 2.1.0")];

fn record() -> PathBuf {
    shell::root().join("tests/gpu/h100.jsonl")
}

fn page() -> PathBuf {
    shell::root().join("README.md")
}

/// `cargo xtask readme`.
pub fn run() -> Result {
    let fresh = with_table(&shell::read(&page())?, &table(&shell::read(&record())?)?)?;
    println!("README.md: {}", if shell::write(&page(), &fresh)? { "table written" } else { "the table was current" });
    Ok(())
}

/// For `tidy`: a problem if the table is not what the record gives.
pub fn out_of_date() -> Result<Option<String>> {
    if !record().is_file() || !page().is_file() {
        println!("tidy: speed table of README.md: skipped (README.md or tests/gpu/h100.jsonl is absent)");
        return Ok(None);
    }
    let text = shell::read(&page())?;
    let fresh = with_table(&text, &table(&shell::read(&record())?)?)?;
    Ok((fresh != text)
        .then(|| "README.md: the speed table is not that of tests/gpu/h100.jsonl; type: cargo xtask readme".to_owned()))
}

/// The page with the text between the marks replaced.
fn with_table(page: &str, table: &str) -> Result<String> {
    let parts = page.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    match parts {
        Some((before, after)) => Ok(format!("{before}{BEGIN}\n{table}{END}{after}")),
        None => fail(format!("README.md: the marks {BEGIN} and {END} are missing")),
    }
}

/// The table, from JSON lines `{op, case, us, gbs, device, driver, ptx_sha}` and the peers' `{peer, op, case, us, gbs}`.
fn table(jsonl: &str) -> Result<String> {
    let mut ours: Vec<(String, String, f64, Option<f64>)> = Vec::new();
    let mut peers: BTreeMap<(String, String, String), f64> = BTreeMap::new();
    let mut machine = String::new();
    // What the machine itself can do stands above the table, not in it.
    let mut limits = String::new();
    for (i, line) in jsonl.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let json: Value = serde_json::from_str(line).map_err(|e| Failure(format!("tests/gpu/h100.jsonl:{}: {e}", i + 1)))?;
        let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
        let (op, case) = (text("op"), text("case"));
        // A case that failed has an error in place of a time.
        let Some(us) = json["us"].as_f64() else { continue };
        match json["peer"].as_str() {
            Some(peer) => {
                peers.insert((peer.to_owned(), op, case), us);
            }
            None => {
                if machine.is_empty() && !text("device").is_empty() {
                    machine = format!("{}, driver {}", text("device"), text("driver"));
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
                ours.retain(|(old_op, old_case, ..)| (old_op, old_case) != (&op, &case));
                ours.push((op, case, us, json["gbs"].as_f64()));
            }
        }
    }
    // By op, cases in the order of the run.
    ours.sort_by(|a, b| a.0.cmp(&b.0));
    let times =
        |op: &str, case: &str| PEERS.map(|(peer, _)| peers.get(&(peer.to_owned(), op.to_owned(), case.to_owned())).copied());
    let mut table = format!(
        "Microseconds on {machine}; ours and both peers in one run, by the same method. Ratio: ours to the faster peer.{limits}\n\n"
    );
    let beside: Vec<_> = ours.iter().filter(|(op, case, ..)| times(op, case).iter().any(Option::is_some)).collect();
    let alone: Vec<_> = ours.iter().filter(|(op, case, ..)| times(op, case).iter().all(Option::is_none)).collect();
    if !beside.is_empty() {
        table.push_str("| op | case | ferrotile | GB/s |");
        PEERS.iter().for_each(|(_, name)| table.push_str(&format!(" {name} |")));
        table.push_str(" ratio |\n|---|---|---:|---:|---:|---:|---:|\n");
    }
    let cell = |value: Option<f64>, digits: usize| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"));
    // A bar in a cell would end it.
    let start =
        |op: &str, case: &str, us: f64, gbs| format!("| `{op}` | {} | {us:.2} | {} |", case.replace('|', "\\|"), cell(gbs, 0));
    for (op, case, us, gbs) in beside {
        let times = times(op, case);
        let fastest = times.iter().flatten().copied().reduce(f64::min);
        table.push_str(&start(op, case, *us, *gbs));
        times.iter().for_each(|time| table.push_str(&format!(" {} |", cell(*time, 2))));
        table.push_str(&format!(" {} |\n", cell(fastest.map(|fastest| us / fastest), 2)));
    }
    if !alone.is_empty() {
        let summary = format!("{} cases that the peers' run does not have", alone.len());
        table.push_str(&format!(
            "\n<details><summary>{summary}</summary>\n\n| op | case | ferrotile | GB/s |\n|---|---|---:|---:|\n"
        ));
        alone.into_iter().for_each(|(op, case, us, gbs)| table.push_str(&(start(op, case, *us, *gbs) + "\n")));
        table.push_str("\n</details>\n");
    }
    Ok(table)
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
        let expected = "Microseconds on H100, driver 580; ours and both peers in one run, by the same method. Ratio: ours to the faster peer. An empty pair of events reads 1.28. Copying 1 GiB on the device: 3007 GB/s.

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
        assert_eq!(table(LINES).unwrap(), expected);
        assert!(table("{\n").is_err());
    }

    #[test]
    fn only_the_part_between_the_marks_changes() {
        let page = format!("# A\n{BEGIN}\nold\n{END}\nrest\n");
        let once = with_table(&page, "new\n").unwrap();
        assert_eq!(once, format!("# A\n{BEGIN}\nnew\n{END}\nrest\n"));
        assert_eq!(with_table(&once, "new\n").unwrap(), once);
        assert!(with_table("# A\n", "new\n").is_err());
    }
}
