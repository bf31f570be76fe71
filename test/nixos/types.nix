# Types of options, as in nixpkgs' lib.types: `check` tells whether one definition may be of the
# type, `merge` makes one value of all definitions ({ file, value }, in order).
lib:

let
  inherit (builtins)
    all
    concatLists
    concatMap
    elem
    elemAt
    genList
    groupBy
    head
    isAttrs
    isBool
    isFloat
    isInt
    isList
    isString
    length
    map
    mapAttrs
    toJSON
    ;

  inherit (import ./definitions.nix lib)
    discharge
    showDefinitions
    showOption
    wrongType
    ;

  # One value, or several that are equal.
  mergeEqual =
    loc: defs:
    let
      first = (head defs).value;
    in
    if all (def: def.value == first) defs then
      first
    else
      throw "The option `${showOption loc}' has conflicting definition values:${showDefinitions defs}";

  simple = description: check: {
    inherit description check;
    merge = mergeEqual;
  };

  # Checks each definition, then merges: what an option does, and each element of a list or set.
  checked =
    loc: type: defs:
    let
      wrong = builtins.filter (def: !(type.check def.value)) defs;
    in
    if wrong == [ ] then
      type.merge loc defs
    else
      throw (wrongType loc type.description wrong);

  types = rec {
    inherit checked;

    bool = simple "boolean" isBool;
    int = simple "signed integer" isInt;
    str = simple "string" isString;
    unsigned = simple "unsigned integer, meaning >=0" (value: isInt value && value >= 0);
    port = simple "16 bit unsigned integer; between 0 and 65535 (both inclusive)" (
      value: isInt value && value >= 0 && value <= 65535
    );
    # Absolute, whether a path of Nix or a string.
    path = simple "absolute path" (value: lib.hasPrefix "/" (toString value));
    package = simple "package" (value: isAttrs value && value.type or "" == "derivation");
    enum = values: simple "one of ${toJSON values}" (value: elem value values);
    matching = pattern: simple "string matching the pattern ${pattern}" (
      value: isString value && builtins.match pattern value != null
    );

    lines = {
      description = "strings concatenated with \"\\n\"";
      check = isString;
      merge = loc: defs: lib.concatStringsSep "\n" (map (def: def.value) defs);
    };

    nullOr = type: {
      description = "null or ${type.description}";
      check = value: value == null || type.check value;
      merge = loc: defs: if all (def: def.value == null) defs then null else checked loc type defs;
    };

    either = one: other: {
      description = "${one.description} or ${other.description}";
      check = value: one.check value || other.check value;
      merge =
        loc: defs:
        if all (def: one.check def.value) defs then one.merge loc defs else checked loc other defs;
    };
    oneOf = list: builtins.foldl' either (head list) (builtins.tail list);

    listOf = type: {
      description = "list of ${type.description}";
      check = isList;
      merge =
        loc: defs:
        let
          # As NixOS counts them, from 1.
          place = definition: entry: "[definition ${toString definition}-entry ${toString entry}]";
          each = list: f: genList (index: f (index + 1) (elemAt list index)) (length list);
        in
        concatLists (
          each defs (
            definition:
            { file, value, ... }:
            each value (
              entry: value: checked (loc ++ [ (place definition entry) ]) type [ { inherit file value; } ]
            )
          )
        );
    };

    # Each element has its own mkIf, mkForce and so on.
    attrsOf = type: {
      description = "attribute set of ${type.description}";
      check = isAttrs;
      merge = loc: defs: mapAttrs (name: checked (loc ++ [ name ]) type) (byName defs);
    };

    # A set with these fields and no others. Those that stand in no definition are left out.
    fields = known: {
      description = "attribute set with ${lib.concatStringsSep ", " (builtins.attrNames known)}";
      check = value: isAttrs value && all (name: known ? ${name}) (builtins.attrNames value);
      merge = loc: defs: mapAttrs (name: checked (loc ++ [ name ]) known.${name}) (byName defs);
    };

    # What a generator of TOML or JSON takes.
    data = {
      description = "TOML value";
      check = value: builtins.any (is: is value) [ isBool isInt isFloat isString isList isAttrs ];
      merge =
        loc: defs:
        if all (def: isAttrs def.value) defs then
          (attrsOf data).merge loc defs
        else if all (def: isList def.value) defs then
          (listOf data).merge loc defs
        else
          mergeEqual loc defs;
    };

    # systemd's settings: a value, or several of them for as many lines.
    unitOption =
      let
        atom = oneOf [
          bool
          int
          str
          path
        ];
      in
      either (listOf atom) atom;

    unspecified = simple "unspecified value" (_: true);
  };

  # Definitions of sets, taken apart: for each name those that count.
  byName =
    defs:
    let
      entries = concatMap (
        { file, value, ... }:
        lib.mapAttrsToList (name: value: { inherit name file value; }) value
      ) defs;
      counting = mapAttrs (_: discharge) (groupBy (entry: entry.name) entries);
    in
    lib.filterAttrs (_: found: found != [ ]) counting;
in
types
