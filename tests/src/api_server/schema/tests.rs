use serde_json::{Value, json};

use super::Schema;

fn schema(properties: Value) -> Schema {
    let definition = json!({"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": {
        "type": "object", "properties": {"spec": {"type": "object", "properties": properties}},
    }}}]}});
    Schema::of(&definition, "v1").unwrap().unwrap()
}

#[test]
fn what_is_not_in_the_schema_goes_and_defaults_come() {
    let schema = schema(json!({
        "kept": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        "map": {"type": "object", "additionalProperties": {"type": "string"}},
        "list": {"type": "array", "items": {
            "type": "object", "properties": {"a": {"type": "integer", "default": 7}},
        }},
    }));
    let mut object = json!({
        "kind": "K", "metadata": {"name": "x"}, "other": 1,
        "spec": {"kept": {"any": 1}, "map": {"k": "v"}, "list": [{"b": 1}, {"a": 2}], "no": {}},
    });
    let unknown = schema.prune(&mut object);
    schema.default(&mut object);
    assert_eq!(unknown, ["other", "spec.list[0].b", "spec.no"]);
    assert_eq!(
        object,
        json!({
            "kind": "K", "metadata": {"name": "x"},
            "spec": {"kept": {"any": 1}, "map": {"k": "v"}, "list": [{"a": 7}, {"a": 2}]},
        })
    );
    assert!(schema.faults(&object, None).is_empty());
}

/// A schema, a good value, a bad one and what is said of it.
#[test]
fn each_word_refuses_its_bad_value() {
    let port = json!({"type": "integer", "minimum": 1, "maximum": 9, "exclusiveMaximum": true});
    for (schema_of_f, good, bad, said) in [
        (json!({"type": "string"}), json!("a"), json!(1), "must be of type string: integer"),
        (
            json!({"enum": ["a"]}),
            json!("a"),
            json!("b"),
            "Unsupported value: \"b\": supported values: \"a\"",
        ),
        (port.clone(), json!(8), json!(9), "should be less than 9"),
        (port, json!(1), json!(0), "should be greater than or equal to 1"),
        (json!({"multipleOf": 2}), json!(4), json!(3), "a multiple of 2"),
        (json!({"pattern": "^a+$"}), json!("aa"), json!("ab"), "should match '^a+$'"),
        (json!({"maxLength": 2}), json!("äö"), json!("abc"), "at most 2 chars long"),
        (json!({"minLength": 1}), json!("a"), json!(""), "at least 1 chars long"),
        (json!({"type": "array", "minItems": 1}), json!([1]), json!([]), "at least 1 items"),
        (json!({"type": "array", "maxItems": 1}), json!([1]), json!([1, 2]), "Too many: 2"),
        (
            json!({"type": "object", "minProperties": 1}),
            json!({"a": 1}),
            json!({}),
            "at least 1 properties",
        ),
        (
            json!({"type": "object", "required": ["a"]}),
            json!({"a": 1}),
            json!({}),
            "spec.f.a: Required value",
        ),
        (json!({"format": "date-time"}), json!("2026-01-01T00:00:00Z"), json!("soon"), "date-time"),
        (json!({"anyOf": [{"type": "string"}, {"minimum": 3}]}), json!(3), json!(2), "(anyOf)"),
        (json!({"oneOf": [{"minimum": 1}, {"minimum": 2}]}), json!(1), json!(2), "(oneOf)"),
        (json!({"not": {"enum": [1]}}), json!(2), json!(1), "(not)"),
        (json!({"x-kubernetes-int-or-string": true}), json!("a"), json!(true), "integer or string"),
        (
            json!({"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"]}),
            json!([{"k": 1}, {"k": 2}]),
            json!([{"k": 1}, {"k": 1}]),
            "Duplicate value: {\"k\":1}",
        ),
        (
            json!({"type": "integer", "x-kubernetes-validations": [
                {"rule": "self < 5", "messageExpression": "'it is ' + string(self)"},
            ]}),
            json!(4),
            json!(5),
            "spec.f: Invalid value: 5: it is 5",
        ),
    ] {
        let schema = schema(json!({"f": schema_of_f}));
        let faults = |value: &Value| schema.faults(&json!({"spec": {"f": value}}), None);
        assert_eq!(faults(&good), Vec::<String>::new(), "{schema_of_f}");
        let found = faults(&bad);
        assert!(found.len() == 1 && found[0].contains(said), "{schema_of_f}: {found:?}");
    }
}

#[test]
fn rules_over_a_change_see_what_was_before() {
    let rule = json!({"rule": "self == oldSelf", "message": "it stays"});
    let schema = schema(json!({"f": {"type": "string", "x-kubernetes-validations": [rule]}}));
    let object = |text: &str| json!({"spec": {"f": text}});
    assert!(schema.faults(&object("a"), None).is_empty());
    assert!(schema.faults(&object("a"), Some(&object("a"))).is_empty());
    assert!(schema.faults(&object("a"), Some(&json!({"spec": {}}))).is_empty());
    assert_eq!(
        schema.faults(&object("b"), Some(&object("a"))),
        ["spec.f: Invalid value: \"b\": it stays"]
    );
}

#[test]
fn what_cannot_be_evaluated_is_refused_by_name() {
    for (property, said) in [
        (json!({"patternProperties": {}}), "the schema's word"),
        (json!({"x-kubernetes-validations": [{"rule": "isURL(self)"}]}), "the function isURL"),
        (
            json!({"format": "date-time", "x-kubernetes-validations": [{"rule": "true"}]}),
            "the format of a time",
        ),
        (
            json!({"items": {"x-kubernetes-validations": [{"rule": "self == oldSelf"}]}}),
            "changes of a list's items",
        ),
    ] {
        let definition = json!({"spec": {"versions": [{"name": "v1", "schema": {
            "openAPIV3Schema": {"properties": {"f": property}},
        }}]}});
        let refusal = Schema::of(&definition, "v1").err().unwrap();
        assert!(refusal.code == 501 && refusal.message.contains(said), "{refusal:?}");
    }
}
