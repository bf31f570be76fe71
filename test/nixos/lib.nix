# The functions of nixpkgs' lib that the modules use, under their names there and with the same
# meaning. What is not here is not known: a module that asks for it fails.
let
  inherit (builtins)
    attrNames
    concatStringsSep
    elemAt
    filter
    genList
    isList
    length
    map
    substring
    stringLength
    ;
in
rec {
  inherit (builtins)
    attrNames
    attrValues
    concatMap
    concatStringsSep
    elem
    filter
    head
    isBool
    isInt
    isList
    isString
    length
    listToAttrs
    mapAttrs
    match
    removeAttrs
    replaceStrings
    tail
    ;

  # Properties of definitions. A smaller priority wins; 100 is a plain definition.
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkOptionDefault = mkOverride 1500;
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  mkOrder = priority: content: {
    _type = "order";
    inherit priority content;
  };
  mkBefore = mkOrder 500;
  mkAfter = mkOrder 1500;

  nameValuePair = name: value: { inherit name value; };
  mapAttrsToList = f: attrs: map (name: f name attrs.${name}) (attrNames attrs);
  mapAttrs' = f: attrs: builtins.listToAttrs (mapAttrsToList f attrs);
  filterAttrs =
    keep: attrs:
    builtins.listToAttrs (
      map (name: nameValuePair name attrs.${name}) (
        filter (name: keep name attrs.${name}) (attrNames attrs)
      )
    );
  genAttrs = names: f: builtins.listToAttrs (map (name: nameValuePair name (f name)) names);
  optional = condition: value: if condition then [ value ] else [ ];
  optionals = condition: values: if condition then values else [ ];
  optionalAttrs = condition: attrs: if condition then attrs else { };
  optionalString = condition: string: if condition then string else "";
  concatMapStringsSep = separator: f: list: concatStringsSep separator (map f list);
  flatten = value: if isList value then builtins.concatLists (map flatten value) else [ value ];
  reverseList = list: genList (index: elemAt list (length list - index - 1)) (length list);
  unique = builtins.foldl' (
    seen: value: seen ++ optional (!(builtins.elem value seen)) value
  ) [ ];
  hasPrefix = prefix: string: substring 0 (stringLength prefix) string == prefix;
  removePrefix =
    prefix: string:
    if hasPrefix prefix string then substring (stringLength prefix) (-1) string else string;
  splitString = separator: string: filter builtins.isString (builtins.split separator string);
}
