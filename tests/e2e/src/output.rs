//! What programs read: `--output json`, whose keys are a contract held by the files in `golden/`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::on_laptop;
use crate::harness::test::as_administrator;

/// One line per place in the value: its path and kind. Lists count as one place.
fn shape(value: &Value) -> String {
    fn walk(path: &str, value: &Value, lines: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                map.iter().for_each(|(key, value)| walk(&format!("{path}.{key}"), value, lines))
            }
            Value::Array(list) => {
                lines.insert(format!("{path}: list"));
                list.iter().for_each(|value| walk(&format!("{path}[]"), value, lines));
            }
            Value::String(_) => drop(lines.insert(format!("{path}: string"))),
            Value::Number(_) => drop(lines.insert(format!("{path}: number"))),
            Value::Bool(_) => drop(lines.insert(format!("{path}: bool"))),
            Value::Null => drop(lines.insert(format!("{path}: null"))),
        }
    }
    let mut lines = BTreeSet::new();
    walk("", value, &mut lines);
    lines.into_iter().fold(String::new(), |text, line| text + &line + "\n")
}

/// Compares with the golden file; `FORKD_UPDATE=1` writes it.
#[track_caller]
fn golden(name: &str, value: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.txt"));
    let now = shape(value);
    if std::env::var_os("FORKD_UPDATE").is_some() {
        fs::write(&path, &now).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    let before = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(
        now, before,
        "the JSON of `forkd {name}` has another shape; FORKD_UPDATE=1 accepts it\n{value:#}"
    );
}

#[test]
fn the_json_of_every_command_keeps_its_keys() {
    on_laptop(|laptop| {
        golden("version", &laptop.forkd_json(&["version"]));
        golden("connect", &laptop.forkd_json(&["connect", "--namespace", "shop"]));
        let cart = laptop.serve("cart", "laptop");
        golden("intercept", &laptop.intercept("cart", cart.port(), &["--fork", "alice"]));
        golden("status", &laptop.forkd_json(&["status"]));
        golden("list", &laptop.forkd_json(&["list"]));
        golden("leave", &laptop.forkd_json(&["leave", "cart", "--namespace", "shop"]));
        golden("quit", &laptop.forkd_json(&["quit"]));
        let image = crate::harness::install::image();
        let install = ["install", "--dry-run", "--yes", "--image", &image, "--image-pull-policy", "Never"];
        golden("install", &as_administrator(laptop).forkd_json(&install));
    });
}

#[test]
fn a_failure_is_one_json_object_on_stderr_with_error_because_try_and_exit() {
    on_laptop(|laptop| {
        let failed = laptop.forkd(&["--output", "json", "status"]);
        assert_eq!((failed.code, failed.stdout.as_str()), (3, ""), "{failed}");
        let object: Value =
            serde_json::from_str(&failed.stderr).unwrap_or_else(|error| panic!("{error}: {failed}"));
        assert_eq!(object["exit"], 3, "{failed}");
        assert!(object["error"].is_string() && object["try"].is_string(), "{failed}");
        laptop.connect();
        let failed = laptop.forkd(&["--output", "json", "intercept", "nothing", "--namespace", "shop"]);
        let object: Value =
            serde_json::from_str(&failed.stderr).unwrap_or_else(|error| panic!("{error}: {failed}"));
        assert_eq!((failed.code, &object["exit"]), (1, &1.into()), "{failed}");
        assert!(object["because"].is_array(), "{failed}");
    });
}

#[test]
fn a_command_line_that_makes_no_sense_ends_with_2() {
    on_laptop(|laptop| {
        for args in [
            &["no-such-command"][..],
            &["intercept"],
            &["intercept", "cart", "--port", "0"],
            &["intercept", "cart", "--port", "99999"],
            &["intercept", "cart", "--port", "8080:"],
            &["connect", "--output", "xml"],
        ] {
            assert_eq!(laptop.forkd(args).code, 2, "{args:?}");
        }
    });
}
