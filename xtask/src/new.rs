//! `cargo xtask new FAMILY/OP`: the three files of an op, working from the start, and the lines that name them.

use crate::{Result, fail, shell, tidy};

/// Options of the command.
#[derive(clap::Args)]
pub struct Options {
    /// Family and op, both in snake_case: `moe/topk_gate`
    #[arg(value_name = "FAMILY/OP")]
    name: String,
}

/// Package and template of each file.
const FILES: [(&str, &str); 3] = [
    ("kernels", include_str!("templates/kernel.txt")),
    ("host", include_str!("templates/host.txt")),
    ("tests", include_str!("templates/test.txt")),
];

/// Folders of the packages that are no families.
const RESERVED: [&str; 6] = ["device", "support", "bin", "layers", "ep", "common"];

/// `cargo xtask new`.
pub fn run(options: &Options) -> Result {
    let (family, op) = parse(&options.name)?;
    if let Some((op, family)) = tidy::ops_matching(op).into_iter().find(|(known, _)| known == op) {
        return fail(format!("new: the op {op} exists already, in {family}"));
    }
    let root = shell::root();
    // All texts first, so that a mistake leaves nothing half done.
    let mut texts = Vec::new();
    for (package, template) in FILES {
        let src = root.join(package).join("src");
        texts.push((src.join(format!("{family}/{op}.rs")), fill(template, family, op)));
        let module = src.join(format!("{family}/mod.rs"));
        let text = if module.is_file() { shell::read(&module)? } else { format!("//! The ops of the family `{family}`.\n") };
        texts.push((module, add_mod(&text, op)));
        let lib = src.join("lib.rs");
        let text = add_mod(&shell::read(&lib)?, family);
        texts.push((
            lib,
            match package {
                "tests" => add_to_list(
                    &add_to_list(&text, "suites", &format!("{family}::{op}::SUITE"))?,
                    "benches",
                    &format!("{family}::{op}::bench()"),
                )?,
                _ => text,
            },
        ));
    }
    for (path, text) in &texts {
        if shell::write(path, text)? {
            println!("{}", path.strip_prefix(&root).unwrap_or(path).display());
        }
    }
    println!("next: write what the op is to compute into these files, then: cargo xtask test {op}");
    Ok(())
}

/// Family and op of `FAMILY/OP`.
fn parse(name: &str) -> Result<(&str, &str)> {
    let is_name = |part: &str| {
        // Two underscores separate op and kernel in the names of PTX entries.
        part.starts_with(|c: char| c.is_ascii_lowercase())
            && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            && !part.contains("__")
            && !part.ends_with('_')
    };
    match name.split_once('/') {
        Some((family, op)) if is_name(family) && is_name(op) => {
            if RESERVED.contains(&family) || op == "mod" || op.starts_with("common") {
                return fail(format!("new: {family}/{op} has another meaning in this tree"));
            }
            Ok((family, op))
        }
        _ => fail(format!("new: expected FAMILY/OP in snake_case (moe/topk_gate), got `{name}`")),
    }
}

fn fill(template: &str, family: &str, op: &str) -> String {
    template.replace("OPNAME", op).replace("FAMILY", family)
}

/// The text with `pub mod NAME;` among its other `mod` lines, sorted by name as rustfmt does; after the module doc and the
/// `use` lines if it has none.
fn add_mod(text: &str, name: &str) -> String {
    fn module(line: &str) -> Option<&str> {
        line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod ")?.strip_suffix(';')
    }
    let lines: Vec<&str> = text.lines().collect();
    let mods: Vec<(usize, &str)> = lines.iter().enumerate().filter_map(|(i, line)| Some((i, module(line)?))).collect();
    if mods.iter().any(|(_, known)| *known == name) {
        return text.to_owned();
    }
    let new = format!("pub mod {name};");
    let mut block = vec![new.as_str()];
    let at = match (mods.iter().find(|(_, known)| *known > name), mods.last()) {
        // Attributes above a line belong to it.
        (Some((i, _)), _) => i - lines[..*i].iter().rev().take_while(|line| line.starts_with("#[")).count(),
        (None, Some((i, _))) => i + 1,
        (None, None) => {
            block.insert(0, "");
            lines.iter().rposition(|line| line.starts_with("//!") || line.starts_with("use ")).map_or(0, |i| i + 1)
        }
    };
    let mut all = lines[..at].to_vec();
    all.extend(block);
    all.extend(&lines[at..]);
    all.join("\n") + "\n"
}

/// The text of the test crate's `lib.rs` with an item more in the `vec![...]` of a function, sorted.
fn add_to_list(text: &str, function: &str, item: &str) -> Result<String> {
    let list = text.find(&format!("fn {function}()")).and_then(|at| {
        let start = at + text[at..].find("vec![")? + "vec![".len();
        Some((start, start + text[start..].find(']')?))
    });
    let Some((start, end)) = list else {
        return fail(format!("new: tests/src/lib.rs has no `fn {function}()` with a `vec![...]`"));
    };
    let mut items: Vec<&str> = text[start..end].split(',').map(str::trim).filter(|item| !item.is_empty()).collect();
    items.push(item);
    items.sort_unstable();
    items.dedup();
    // rustfmt keeps a list on one line if it fits.
    let before = start - text[..start].rfind('\n').map_or(0, |newline| newline + 1);
    let one_line = items.join(", ");
    let list = if before + one_line.len() + "];".len() <= 130 {
        one_line
    } else {
        format!("\n        {},\n    ", items.join(",\n        "))
    };
    Ok(format!("{}{list}{}", &text[..start], &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(parse("moe/topk_gate").unwrap(), ("moe", "topk_gate"));
        for name in
            ["topk_gate", "moe/", "Moe/gate", "moe/a__b", "moe/gate_", "moe/x/y", "device/warp", "moe/common_scan", "moe/1st"]
        {
            assert!(parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn mod_lines_stay_sorted() {
        let text = "//! Doc.\n\nmod a;\n#[cfg(x)]\n#[path = \"y\"]\npub mod c;\nmod e;\n\nfn f() {}\n";
        let with = |name: &str| add_mod(text, name);
        assert_eq!(with("b"), "//! Doc.\n\nmod a;\npub mod b;\n#[cfg(x)]\n#[path = \"y\"]\npub mod c;\nmod e;\n\nfn f() {}\n");
        assert_eq!(with("d"), "//! Doc.\n\nmod a;\n#[cfg(x)]\n#[path = \"y\"]\npub mod c;\npub mod d;\nmod e;\n\nfn f() {}\n");
        assert_eq!(with("g"), "//! Doc.\n\nmod a;\n#[cfg(x)]\n#[path = \"y\"]\npub mod c;\nmod e;\npub mod g;\n\nfn f() {}\n");
        assert_eq!(with("a"), text);
        assert_eq!(add_mod("//! Doc.\n", "a"), "//! Doc.\n\npub mod a;\n");
        assert_eq!(add_mod("//! Doc.\nuse x::y;\n\nfn f() {}\n", "a"), "//! Doc.\nuse x::y;\n\npub mod a;\n\nfn f() {}\n");
    }

    #[test]
    fn lists_stay_sorted() {
        let text =
            "pub fn suites() -> Vec<Suite> {\n    vec![]\n}\npub fn benches() {\n    let per_op: Vec<Vec<Row>> = vec![];\n}\n";
        let one = add_to_list(text, "suites", "moe::gate::SUITE").unwrap();
        assert!(
            one.contains("    vec![moe::gate::SUITE]\n}\npub fn benches() {\n    let per_op: Vec<Vec<Row>> = vec![];\n"),
            "{one}"
        );
        let two = add_to_list(&one, "suites", "mhc::post::SUITE").unwrap();
        assert!(two.contains("    vec![mhc::post::SUITE, moe::gate::SUITE]\n"), "{two}");
        let long = add_to_list(&two, "suites", &format!("quant::{}", "x".repeat(80))).unwrap();
        assert!(long.contains("vec![\n        mhc::post::SUITE,\n        moe::gate::SUITE,\n        quant::x"), "{long}");
        assert_eq!(add_to_list(&long, "suites", "moe::gate::SUITE").unwrap(), long);
        assert!(add_to_list(text, "benches", "moe::gate::bench()").unwrap().contains("= vec![moe::gate::bench()];\n"));
        assert!(add_to_list(text, "others", "x").is_err());
    }

    #[test]
    fn templates_are_filled() {
        for (package, template) in FILES {
            let text = fill(template, "moe", "topk_gate");
            assert!(text.starts_with("//! topk_gate: ") && !text.contains("OPNAME") && !text.contains("FAMILY"), "{package}");
        }
    }
}
