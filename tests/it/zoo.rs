//! The zoo: what it trains, measures and writes, and that it goes on where it stopped.

use super::train::{Place, recipe, rich_recipe};
use melglow::voice::Voice;
use serde_json::Value;
use std::fs;
use std::time::{Duration, Instant};

/// A place with recipes `plain.json` (whitened too) and `rich.json`, and the arguments of a zoo of them.
fn place() -> Place {
    let place = Place::new();
    let mut plain = recipe(1);
    plain.name = "plain".to_string();
    plain.flow.whitening = rich_recipe(1).flow.whitening;
    let mut rich = rich_recipe(1);
    rich.name = "rich".to_string();
    for recipe in [plain, rich] {
        let path = place.path(format!("{}.json", recipe.name));
        fs::write(path, serde_json::to_string(&recipe).unwrap()).unwrap();
    }
    place
}

fn args<'a>(minutes: &'a str, recipes: &'a str) -> Vec<&'a str> {
    vec!["zoo", "--data", "data", "--minutes", minutes, "--recipes", recipes, "--held-out", "e..f"]
}

fn table(place: &Place) -> Value {
    serde_json::from_str(&fs::read_to_string(place.path("zoo/zoo.json")).unwrap()).unwrap()
}

#[test]
fn recipes_are_trained_for_the_same_time_and_measured() {
    let place = place();
    fs::write(place.path("score.sh"), "test -s \"$1\" && test -s \"$2\" && echo it is 3.25").unwrap();
    let args = [args("0.01", "plain.json,rich.json,plain.json-raw"), vec!["--scorer", "sh score.sh"]].concat();
    let (code, out, err) = place.run(&args);
    assert_eq!(code, 0, "{err}");
    let table = table(&place);
    let names: Vec<_> = table["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["whitening-of-plain", "plain", "rich", "plain-raw"]);
    let row = |name: &str| table["rows"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
    for name in ["plain", "rich", "plain-raw"] {
        let row = row(name);
        let (steps, seconds) = (row["steps"].as_u64().unwrap(), row["cpu_seconds"].as_f64().unwrap());
        // over by less than the last step
        assert!(steps > 3 && seconds >= 0.6 && seconds < 0.6 * (1.0 + 3.0 / steps as f64) + 0.05, "{name}: {row}");
        assert_eq!(row["score"], 3.25);
        assert_eq!(row["likelihood"], "exact");
        assert!(row["real_time_factor"].as_f64().unwrap() > 0.0);
        Voice::open(place.path("zoo").join(name)).unwrap();
        for clip in ["e", "f"] {
            assert!(place.path(format!("zoo/sounds/{name}/{clip}.wav")).is_file());
        }
    }
    let number = |name: &str, field: &str| row(name)[field].as_f64().unwrap();
    assert_eq!(number("plain", "parameters"), number("plain-raw", "parameters"), "the front is counted");
    assert_eq!(number("whitening-of-plain", "parameters"), 0.0);
    assert!(number("plain", "gmac_per_second") > number("plain-raw", "gmac_per_second"));
    assert!(row("plain")["lookahead_frames"].is_u64());
    // what is said of the likelihood is what eval says
    let (_, eval, _) = place.run(&["eval", "--voice", "zoo/rich", "--data", "data", "--clips", "e..f", "--json"]);
    let eval: Value = serde_json::from_str(&eval).unwrap();
    assert!((eval["per_sample"].as_f64().unwrap() - number("rich", "bits")).abs() < 1e-9);
    // the fronts of all are one
    let whitening = |name: &str| {
        let tensors = Voice::open(place.path("zoo").join(name)).unwrap().tensors().unwrap();
        tensors["whiten.layers.2.weight"].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert!(whitening("plain") == whitening("rich") && whitening("plain") == whitening("whitening-of-plain"));

    assert_eq!(out, fs::read_to_string(place.path("zoo/zoo.md")).unwrap());
    let bits: Vec<f64> = out
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| recipe"))
        .map(|line| line.split(['|', '±']).nth(2).unwrap().trim().parse().unwrap())
        .collect();
    assert!(bits.len() == 4 && bits.is_sorted(), "{out}");
    assert!(fs::read_dir(place.path("zoo/runs")).unwrap().next().is_none(), "runs are left behind");

    // once more: nothing is left to do
    let begun = Instant::now();
    let (code, again, err) = place.run(&args);
    assert_eq!((code, again == out, err.lines().count()), (0, true, 1), "{err}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[cfg(unix)]
#[test]
fn an_interrupted_zoo_goes_on() {
    let place = place();
    let args = args("0.05", "plain.json,plain.json-raw");
    let log = place.path("zoo/runs/plain/log.jsonl");
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("melglow"))
        .current_dir(place.path(""))
        .args(&args)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while fs::read_to_string(&log).map_or(0, |log| log.lines().count()) < 3 {
        assert!(begun.elapsed().as_secs() < 100, "training does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let (names, step) = (table(&place)["rows"].as_array().unwrap().len(), fs::read_to_string(&log).unwrap());
    assert_eq!(names, 1, "the front alone is done");
    let (code, _, err) = place.run(&args);
    assert_eq!(code, 0, "{err}");
    let table = table(&place);
    let row = &table["rows"][1];
    // both parts together have the time of one
    assert_eq!(row["name"], "plain");
    assert!(row["steps"].as_u64().unwrap() > step.lines().count() as u64);
    let seconds = row["cpu_seconds"].as_f64().unwrap();
    // and one step more at most
    assert!((3.0..6.0).contains(&seconds), "{seconds}");
    assert_eq!(table["rows"][2]["name"], "plain-raw");
}

#[test]
fn what_cannot_be_is_said_on_one_line_before_anything_is_done() {
    let place = place();
    let refusal = |args: &[&str]| {
        let (code, out, err) = place.run(args);
        assert_eq!((code, out.as_str(), err.lines().count()), (1, "", 1), "{err}");
        assert!(!place.path("zoo").exists(), "something is left behind");
        err.trim_end().strip_prefix("melglow: ").unwrap().to_string()
    };
    assert!(refusal(&args("1", "grande")).starts_with("there is no recipe grande, "));
    assert_eq!(refusal(&args("1", "plain.json,plain.json")), "recipe plain is named twice");
    let nobody = [&args("1", "plain.json")[..7], &["--held-out", "nobody"]].concat();
    let expected = "data: has no clip nobody; a clip's name is its file's without the extension";
    assert_eq!(refusal(&nobody), expected);
    let all = [&args("1", "plain.json")[..7], &["--held-out", "a..f"]].concat();
    assert_eq!(refusal(&all), "data: 6 of its 6 clips are held out, expected some but not all");
    let mut other = recipe(1);
    (other.name, other.mel.f_max) = ("other".to_string(), 7000.0);
    fs::write(place.path("other.json"), serde_json::to_string(&other).unwrap()).unwrap();
    let expected = "recipe other has another mel convention than plain: their likelihoods don't compare";
    assert_eq!(refusal(&args("1", "plain.json,other.json")), expected);
    other.name = "../other".to_string();
    fs::write(place.path("other.json"), serde_json::to_string(&other).unwrap()).unwrap();
    assert_eq!(refusal(&args("1", "other.json")), "recipe \"../other\": its name must do for a folder");
    for minutes in ["0", "-1", "nan", "soon"] {
        assert_eq!(place.run(&args(minutes, "plain.json")).0, 2);
    }
    // the scorer is tried before the training
    for (scorer, problem) in [
        ("no-such-program", "scorer no-such-program: cannot be started: "),
        ("false", "scorer false: exit status: 1: nothing"),
        ("echo well", "scorer echo well: expected a number, got "),
    ] {
        let (code, _, err) = place.run(&[&args("1", "plain.json")[..], &["--scorer", scorer]].concat());
        let last = err.lines().last().unwrap();
        assert!(code == 1 && last.starts_with(&format!("melglow: {problem}")), "{err}");
    }
}

#[test]
fn one_held_out_clip_has_no_interval() {
    let place = place();
    let (code, out, err) = place.run(&[&args("0.001", "plain.json-raw")[..7], &["--held-out", "f"]].concat());
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("; bits per sample of 1 held-out clip; ") && !out.contains('±'), "{out}");
    let row = &table(&place)["rows"][0];
    assert!(row["bits"].is_number() && row["bits_ci95"].is_null(), "{row}");
    // a table of an earlier version, of which nothing is left to do
    let path = place.path("zoo/zoo.json");
    let old = fs::read_to_string(&path).unwrap().replace("\"bits_ci95\": null", "\"bits_ci95\": 0.0");
    fs::write(&path, &old).unwrap();
    let (code, again, err) = place.run(&[&args("0.001", "plain.json-raw")[..7], &["--held-out", "f"]].concat());
    assert_eq!((code, again), (0, out), "{err}");
}

#[test]
fn a_table_of_other_settings_is_not_gone_on_with() {
    let place = place();
    let (code, _, err) = place.run(&args("0.001", "plain.json-raw"));
    assert_eq!(code, 0, "{err}");
    let before = fs::read(place.path("zoo/zoo.json")).unwrap();
    let (code, _, err) = place.run(&args("0.002", "plain.json-raw"));
    let expected = "melglow: zoo/zoo.json: was made with other settings (minutes, seed, clips, scorer or machine); \
                    choose another --out\n";
    assert_eq!((code, err.as_str()), (1, expected));
    let changed =
        fs::read_to_string(place.path("plain.json")).unwrap().replace("\"warmup_steps\":10", "\"warmup_steps\":9");
    fs::write(place.path("plain.json"), changed).unwrap();
    let (code, _, err) = place.run(&args("0.001", "plain.json-raw"));
    let expected = "melglow: recipe plain-raw isn't the one that the table has; choose another --out\n";
    assert_eq!((code, err.as_str()), (1, expected));
    assert!(before == fs::read(place.path("zoo/zoo.json")).unwrap());
    fs::write(place.path("zoo/zoo.json"), "{}").unwrap();
    let (code, _, err) = place.run(&args("0.001", "plain.json-raw"));
    assert_eq!(code, 1);
    assert!(err.starts_with("melglow: zoo/zoo.json: missing field"), "{err}");
}
