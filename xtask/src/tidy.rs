//! `cargo xtask tidy`: the rules of the tree that rustc does not know.

use crate::{Result, fail, readme, shell};
use std::collections::BTreeSet;
use std::path::Path;

/// Ops that are made of other ops' launchers and have no kernel of their own: `family/op`.
const WITHOUT_KERNEL: &[&str] = &["moe/router"];

/// Only the device layer may use these.
const DEVICE_ONLY: &[&str] =
    &["asm!", "global_asm!", "naked_asm!", "core::arch", "std::arch", "target_arch", "link_name", "llvm.nvvm", "\"ptx-kernel\""];

/// A launcher never panics and never prints.
const NOT_IN_HOST: &[&str] = &["println!", "print!", "eprintln!", "eprint!", "dbg!", ".unwrap()"];

/// Folders with nothing written by hand in them.
const SKIPPED: &[&str] = &["target", ".git", "bundle", "host/ptx", "tests/ptx", ".whl", ".gl"];

/// Files whose trailing whitespace is looked at.
const TEXT: &[&str] = &["rs", "md", "toml", "sh", "json", "jsonl", "txt", "stderr"];

/// `cargo xtask tidy`.
pub fn run() -> Result {
    let root = shell::root();
    let mut files = Vec::new();
    walk(&root, &root, &mut files);
    let mut problems = three_files(&files);
    let mut count = 0;
    for path in &files {
        let text = shell::read(&root.join(path))?;
        problems.extend(check_file(path, &text));
        count += 1;
    }
    for (op, family) in ops(&files) {
        for package in packages(&op, &family) {
            let module = root.join(format!("{package}/src/{family}/mod.rs"));
            if !shell::read(&module).is_ok_and(|text| has_mod_line(&text, &op)) {
                problems.push(format!("{package}/src/{family}/mod.rs: no line `mod {op};`"));
            }
        }
    }
    let table = shell::read(&root.join("docs/device.md"))?;
    for path in files.iter().filter(|path| is_device_api(path)) {
        problems.extend(undocumented(path, &shell::read(&root.join(path))?, &table));
    }
    problems.extend(readme::out_of_date()?);
    if problems.is_empty() {
        println!("tidy: {count} files, {} ops", ops(&files).len());
        return Ok(());
    }
    fail(format!("tidy: {} problems\n  {}", problems.len(), problems.join("\n  ")))
}

/// Every text file below `dir`, relative to the root.
fn walk(root: &Path, dir: &Path, files: &mut Vec<String>) {
    for path in shell::list(dir) {
        let relative = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
        if SKIPPED.contains(&relative.as_str()) || path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            walk(root, &path, files);
        } else if path.extension().is_some_and(|e| TEXT.iter().any(|known| e == *known)) {
            files.push(relative);
        }
    }
}

/// `(op, family)` of every op that has a kernel, a launcher or a test.
pub fn ops(files: &[String]) -> BTreeSet<(String, String)> {
    let families = families(files);
    let mut ops = BTreeSet::new();
    for path in files {
        let parts: Vec<&str> = path.split('/').collect();
        if let [package, "src", family, file] = parts[..]
            && ["kernels", "host", "tests"].contains(&package)
            && families.contains(family)
            && let Some(op) = file.strip_suffix(".rs")
            && op != "mod"
            && !op.starts_with("common")
        {
            ops.insert((op.to_owned(), family.to_owned()));
        }
    }
    ops
}

/// The families are the folders of kernels.
fn families(files: &[String]) -> BTreeSet<&str> {
    let kernel_folder = |path: &'_ String| -> Option<usize> {
        let rest = path.strip_prefix("kernels/src/")?;
        let (folder, file) = rest.split_once('/')?;
        (folder != "device" && !file.contains('/')).then_some(folder.len())
    };
    let start = "kernels/src/".len();
    files.iter().filter_map(|path| kernel_folder(path).map(|len| &path[start..start + len])).collect()
}

/// The packages in which an op must have a file.
fn packages(op: &str, family: &str) -> Vec<&'static str> {
    let mut packages = vec!["kernels", "host", "tests"];
    if WITHOUT_KERNEL.contains(&format!("{family}/{op}").as_str()) {
        packages.remove(0);
    }
    packages
}

/// Whether a file holds functions that kernels may call.
fn is_device_api(path: &str) -> bool {
    let backend = ["mod.rs", "ptx.rs", "macros.rs", "num.rs"];
    path.strip_prefix("kernels/src/device/").is_some_and(|file| !file.contains('/') && !backend.contains(&file))
}

/// Public functions of the device API that the table of docs/device.md does not name. Names that a macro makes stand in its call as
/// plain words and are not seen; what they are made of is.
fn undocumented(path: &str, text: &str, table: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut hidden = false;
    for (i, line) in text.lines().enumerate() {
        let line = line.trim_start();
        // Attributes stand above the function they belong to.
        let was_hidden = hidden;
        hidden = line == "#[doc(hidden)]" || (hidden && line.starts_with("#["));
        let function = line.strip_prefix("pub fn ").or_else(|| line.strip_prefix("pub const fn "));
        let Some(function) = function else { continue };
        let name: String = function.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        // On the host only: how launchers make and pack pointers.
        let for_launchers = ["region", "address", "null"].contains(&name.as_str());
        if !was_hidden && !name.is_empty() && !for_launchers && !table.contains(&format!("`{name}`")) {
            problems.push(format!("{path}:{}: `{name}` is not in the table of docs/device.md", i + 1));
        }
    }
    problems
}

/// One op, one name, three files.
fn three_files(files: &[String]) -> Vec<String> {
    let mut problems = Vec::new();
    for (op, family) in ops(files) {
        for package in packages(&op, &family) {
            let path = format!("{package}/src/{family}/{op}.rs");
            if !files.contains(&path) {
                problems
                    .push(format!("{path}: is absent, but {family}/{op} is an op (an op has a kernel, a launcher and a test)"));
            }
        }
    }
    problems
}

fn has_mod_line(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim();
        line.strip_prefix("pub ").unwrap_or(line) == format!("mod {name};")
    })
}

/// The rules for one file; every problem starts with `path:line`.
fn check_file(path: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    // What a compiler printed is compared as it is.
    if !path.ends_with(".stderr") {
        for (i, line) in text.lines().enumerate() {
            if line.ends_with([' ', '\t']) {
                problems.push(format!("{path}:{}: trailing whitespace", i + 1));
            }
        }
    }
    if !path.ends_with(".rs") {
        return problems;
    }
    let first = text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!")).unwrap_or_default();
    if !first.starts_with("//!") {
        problems.push(format!("{path}:1: no module doc (`//!`) at the top"));
    }
    let code = strip_comments(text);
    if !path.starts_with("kernels/src/device/") && !path.starts_with("xtask/") {
        for (i, line) in code.lines().enumerate() {
            // The crate root chooses what is compiled for the device, by attributes.
            let allowed = |word: &str| path == "kernels/src/lib.rs" && word == "target_arch";
            for word in DEVICE_ONLY.iter().filter(|word| has_word(line, word) && !allowed(word)) {
                problems.push(format!("{path}:{}: `{word}` outside kernels/src/device", i + 1));
            }
        }
    }
    if path.starts_with("host/src/") {
        // The tests of a file are its last part.
        let code = code.split("#[cfg(test)]\n").next().unwrap_or_default();
        for (i, line) in code.lines().enumerate() {
            for word in NOT_IN_HOST.iter().filter(|word| has_word(line, word)) {
                problems.push(format!("{path}:{}: `{word}` in the host crate, which never panics and never prints", i + 1));
            }
        }
    }
    problems
}

/// The word stands in the line and is not the end of a longer one.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        !word.starts_with(|c: char| c.is_alphanumeric()) || !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
    })
}

/// Rust text with its comments blanked out; lines keep their numbers, strings stay.
fn strip_comments(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = String::with_capacity(text.len());
    let mut i = 0;
    // Each round copies or drops one token; `end` is where it ends.
    while i < bytes.len() {
        let rest = &text[i..];
        let end = if rest.starts_with("//") {
            i += rest.find('\n').unwrap_or(rest.len());
            continue;
        } else if rest.starts_with("/*") {
            let len = block_comment(rest);
            code.extend(rest[..len].chars().filter(|&c| c == '\n'));
            i += len;
            continue;
        } else if let Some(len) = raw_string(rest, &code) {
            len
        } else if rest.starts_with('"') {
            quoted(rest, '"')
        } else if rest.starts_with("'\\") || (rest.starts_with('\'') && rest.chars().nth(2) == Some('\'')) {
            // A character, not a lifetime.
            quoted(rest, '\'')
        } else {
            rest.chars().next().map_or(1, char::len_utf8)
        };
        code.push_str(&rest[..end]);
        i += end;
    }
    code
}

/// Length of a literal in quotes, escapes respected.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == quote {
            return i + 1;
        }
    }
    text.len()
}

/// Length of a raw string (`r"..."`, `r#"..."#`) if one starts here.
fn raw_string(text: &str, before: &str) -> Option<usize> {
    let hashes = text.strip_prefix('r')?.bytes().take_while(|&b| b == b'#').count();
    if !text[1 + hashes..].starts_with('"')
        || before.ends_with(|c: char| (c.is_alphanumeric() && c != 'b' && c != 'c') || c == '_')
    {
        return None;
    }
    let start = hashes + 2;
    let close = format!("\"{}", "#".repeat(hashes));
    Some(text[start..].find(&close).map_or(text.len(), |at| start + at + close.len()))
}

/// Length of a block comment; they nest.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < text.len() {
        let rest = &text.as_bytes()[i..];
        if rest.starts_with(b"/*") {
            depth += 1;
            i += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            i += 2;
            if depth == 0 {
                return i;
            }
        } else {
            i += 1;
        }
    }
    text.len()
}

/// Ops whose name or family is `filter`.
pub fn ops_matching(filter: &str) -> Vec<(String, String)> {
    let root = shell::root();
    let mut files = Vec::new();
    for package in ["kernels", "host", "tests"] {
        walk(&root, &root.join(package).join("src"), &mut files);
    }
    ops(&files).into_iter().filter(|(op, family)| op.contains(filter) || family == filter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(list: &[&str]) -> Vec<String> {
        list.iter().map(|path| (*path).to_owned()).collect()
    }

    #[test]
    fn device_functions_stand_in_the_table() {
        assert!(is_device_api("kernels/src/device/warp.rs"));
        assert!(!is_device_api("kernels/src/device/ptx.rs") && !is_device_api("kernels/src/device/emu/mod.rs"));
        let text = "pub fn warp_sum<const N: u32>(v: f32) -> f32 {\n}\n    pub fn null() -> Self {\n";
        assert!(undocumented("a.rs", text, "| `warp_sum` | warp |").is_empty());
        assert_eq!(
            undocumented("a.rs", text, "| `warp_summary` |"),
            ["a.rs:1: `warp_sum` is not in the table of docs/device.md"]
        );
    }

    #[test]
    fn an_op_needs_its_three_files() {
        let mut files = paths(&[
            "kernels/src/moe/mod.rs",
            "kernels/src/moe/common_scan.rs",
            "kernels/src/moe/gate.rs",
            "kernels/src/device/warp.rs",
            "kernels/src/device/emu/mod.rs",
            "host/src/moe/gate.rs",
            "host/src/layers/linear.rs",
            "tests/src/moe/gate.rs",
            "tests/src/support/rng.rs",
        ]);
        assert_eq!(three_files(&files), Vec::<String>::new());
        files.pop();
        files.pop();
        files.push("host/src/moe/count.rs".into());
        let problems = three_files(&files);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems.iter().any(|p| p.starts_with("tests/src/moe/gate.rs: is absent")));
        assert!(problems.iter().any(|p| p.starts_with("kernels/src/moe/count.rs: is absent")));
        assert!(problems.iter().any(|p| p.starts_with("tests/src/moe/count.rs: is absent")));
    }

    #[test]
    fn mod_lines_are_found() {
        let text = "//! Doc.\nmod common;\npub mod gate;\n// mod gone;\n";
        assert!(has_mod_line(text, "common") && has_mod_line(text, "gate"));
        assert!(!has_mod_line(text, "gone") && !has_mod_line(text, "gat"));
    }

    #[test]
    fn hardware_stays_in_the_device_layer() {
        let check = |path: &str, line: &str| check_file(path, &format!("//! Doc.\n{line}\n"));
        for line in
            ["asm!(\"\");", "use core::arch::nvptx;", "#[cfg(target_arch = \"nvptx64\")]", "extern \"ptx-kernel\" fn f() {}"]
        {
            assert_eq!(check("kernels/src/moe/gate.rs", line).len(), 1, "{line}");
            assert_eq!(check("host/src/driver.rs", line).len(), 1, "{line}");
            assert_eq!(check("kernels/src/device/ptx.rs", line), Vec::<String>::new());
        }
        assert_eq!(check("kernels/src/lib.rs", "#[cfg(target_arch = \"nvptx64\")]"), Vec::<String>::new());
        assert_eq!(check("kernels/src/lib.rs", "core::arch::asm!(\"\");").len(), 2);
        for line in ["// asm! is in device/", "/* core::arch */", "let plasma = spasm!();", "/// `asm!`"] {
            assert_eq!(check("kernels/src/moe/gate.rs", line), Vec::<String>::new(), "{line}");
        }
    }

    #[test]
    fn the_host_does_not_panic_or_print() {
        let text = "//! Doc.\n/// let x = f().unwrap();\nfn f() {\n    x.unwrap();\n    eprintln!();\n}\n#[cfg(test)]\nmod tests {\n    fn g() { x.unwrap() }\n}\n";
        let problems = check_file("host/src/tensor.rs", text);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].starts_with("host/src/tensor.rs:4:") && problems[1].starts_with("host/src/tensor.rs:5:"));
        assert!(problems[1].contains("`eprintln!`"));
        assert_eq!(check_file("tests/src/lib.rs", text), Vec::<String>::new());
    }

    #[test]
    fn files_are_clean_and_documented() {
        assert_eq!(check_file("a.rs", "#![no_std]\n//! Doc.\n"), Vec::<String>::new());
        assert_eq!(check_file("a.rs", "// not a doc\n").len(), 1);
        assert_eq!(check_file("a.md", "one \ntwo\t\nthree\n").len(), 2);
        assert_eq!(check_file("a.stderr", "one \n"), Vec::<String>::new());
    }

    #[test]
    fn comments_go_and_strings_stay() {
        let text = "a // b\n\"// c \\\" d\" /* e /* f */\n g */ h\nr#\"// i \"j\"#; '\"' // k\nfn l<'a>(m: &'a str) {} // n\nb'\\'' // o\n";
        let code = "a \n\"// c \\\" d\" \n h\nr#\"// i \"j\"#; '\"' \nfn l<'a>(m: &'a str) {} \nb'\\'' \n";
        assert_eq!(strip_comments(text), code);
    }
}
