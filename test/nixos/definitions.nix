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
    in
    {
      "" = [ def ];
      "if" = if def.value.condition then again def.value.content else [ ];
      "merge" = concatMap again def.value.contents;
      "override" = map (inner: { inherit (def.value) priority; } // inner) (again def.value.content);
      "order" = map (inner: { order = def.value.priority; } // inner) (again def.value.content);
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
      best = foldl' (least: def: if priorityOf def < least then priorityOf def else least) 9999 expanded;
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
  showDefinitions = defs: lib.concatStringsSep "" (map (def: "\n- In `${toString def.file}': ${show def.value}") defs);

  show =
    value:
    let
      text = builtins.tryEval (toJSON value);
    in
    if builtins.isFunction value then "<function>" else if text.success then text.value else "<…>";
}
