# Definitions ({ file, value }) with the properties that mkIf, mkMerge, mkOverride and mkOrder
# give them, and how they are shown in errors.
lib:

let
  inherit (builtins)
    concatMap
    filter
    foldl'
    isAttrs
    map
    sort
    toJSON
    ;

  typeOf = value: if isAttrs value then value._type or "" else "";

  # Drops what is not the case, takes mkMerge apart, keeps priority and order beside the value.
  expand =
    def:
    let
      again = value: expand (def // { inherit value; });
      each = properties: map (inner: properties // inner) (again def.value.content);
    in
    {
      "" = [ def ];
      "if" = if def.value.condition then again def.value.content else [ ];
      "merge" = concatMap again def.value.contents;
      "override" = each { inherit (def.value) priority; };
      "order" = each { order = def.value.priority; };
    }
    .${typeOf def.value} or [ def ];

  priorityOf = def: def.priority or 100;
in
rec {
  # The definitions that count: those of the best priority, in their order.
  discharge =
    defs:
    let
      expanded = concatMap expand defs;
      smaller = one: other: if one < other then one else other;
      best = foldl' smaller 9999 (map priorityOf expanded);
      winners = filter (def: priorityOf def == best) expanded;
    in
    sort (one: other: one.order or 1000 < other.order or 1000) winners;

  # Of a set that is no option itself: mkIf, mkMerge and mkForce apply to each option in it.
  pushDown =
    def:
    let
      again = value: pushDown (def // { inherit value; });
      each = wrap: map (inner: inner // { value = builtins.mapAttrs (_: wrap) inner.value; });
    in
    {
      "" = [ def ];
      "if" = each (content: lib.mkIf def.value.condition content) (again def.value.content);
      "merge" = concatMap again def.value.contents;
      "override" = each (lib.mkOverride def.value.priority) (again def.value.content);
      "order" = each (lib.mkOrder def.value.priority) (again def.value.content);
    }
    .${typeOf def.value} or [ def ];

  showOption = lib.concatStringsSep ".";
  wrongType =
    loc: type: defs:
    "A definition for option `${showOption loc}' is not of type `${type}'.${showDefinitions defs}";
  showDefinitions = lib.concatMapStringsSep "" (
    def: "\n- In `${toString def.file}': ${show def.value}"
  );

  show =
    value:
    let
      text = builtins.tryEval (toJSON value);
    in
    if builtins.isFunction value then "<function>" else if text.success then text.value else "<…>";
}
