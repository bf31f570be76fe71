# NixOS' module system, small: modules with imports, arguments and definitions in, one checked
# configuration out. An option that the table does not have does not exist.
{ lib, options }:

let
  inherit (builtins)
    attrNames
    concatMap
    filter
    functionArgs
    isAttrs
    isFunction
    isPath
    isString
    map
    mapAttrs
    ;
  types = import ./types.nix lib;
  inherit (import ./definitions.nix lib)
    discharge
    pushDown
    showDefinitions
    showOption
    wrongType
    ;

  # "systemd.services.<name>.path" = { … }  ->  { systemd.services."<name>".path = { … }; }
  tree = builtins.foldl' (
    built: path:
    let
      insert =
        parts: node:
        let
          name = builtins.head parts;
          rest = builtins.tail parts;
        in
        node
        // {
          ${name} = if rest == [ ] then options.${path} else insert rest (node.${name} or { });
        };
    in
    insert (lib.splitString "\\." path) built
  ) { } (attrNames options);

  isOption = node: node ? type && node.type ? check;

  # A module's file, function or set, and all that it imports, as { file, config }.
  load =
    args: file: module:
    let
      isFile = isPath module || isString module;
      here = if isFile then toString module else file;
      body = if isFile then import module else module;
      asked = mapAttrs (name: _: args.${name}) (functionArgs body);
      value = if isFunction body then body asked else body;
      structured = value ? config || value ? options;
      stray = attrNames (removeAttrs value [ "config" "imports" "_module" ]);
    in
    if structured && stray != [ ] then
      throw "Module `${here}' has an unsupported attribute `${builtins.head stray}'."
    else
      concatMap (load args here) (value.imports or [ ])
      ++ [
        {
          file = here;
          value =
            if structured then value.config or { } else removeAttrs value [ "imports" "_module" ];
          args = value._module.args or { };
        }
      ];

  # The value of a node of the options' tree, all definitions below it merged. `self` is the set
  # that an option is in, for a default that follows from its neighbours.
  evaluate =
    loc: self: node: defs:
    if isOption node then
      let
        counting = discharge defs;
      in
      if counting != [ ] then
        types.checked loc node.type counting
      else if node ? default then
        node.default
      else if node ? defaultFrom then
        node.defaultFrom loc self
      else
        throw "The option `${showOption loc}' was accessed but has no value defined."
    else
      let
        sets = setsOf loc defs;
        child = name: child: evaluate (loc ++ [ name ]) result child (definitionsOf name sets);
        names = lib.unique (concatMap (def: attrNames def.value) sets);
        # As in an attribute set of submodules: there is what is defined and not off by mkIf.
        present = filter (name: discharge (definitionsOf name sets) != [ ]) names;
        result =
          if node ? "<name>" then
            lib.genAttrs present (name: child name node."<name>")
          else
            mapAttrs child node;
      in
      result;

  definitionsOf =
    name: sets:
    map (def: def // { value = def.value.${name}; }) (filter (def: def.value ? ${name}) sets);

  setsOf =
    loc: defs:
    map (
      def:
      if isAttrs def.value then
        def
      else
        throw (wrongType loc "attribute set" [ def ])
    ) (concatMap pushDown defs);

  # Definitions that no option takes; null where all is well.
  firstUnknown =
    loc: node: defs:
    if isOption node then
      null
    else
      let
        sets = setsOf loc defs;
        names = lib.unique (concatMap (def: attrNames def.value) sets);
        of =
          name:
          let
            here = definitionsOf name sets;
            child = node.${name} or node."<name>" or null;
          in
          if child == null then
            "The option `${showOption (loc ++ [ name ])}' does not exist.${showDefinitions here}"
          else
            firstUnknown (loc ++ [ name ]) child here;
        found = filter (message: message != null) (map of names);
      in
      if found == [ ] then null else builtins.head found;
in

# @param args what modules may ask for beside config and lib
{ args, modules }:
let
  loaded = concatMap (load known "<unknown>") modules;
  # What a module gives to the others as _module.args is known once all are loaded; that no
  # argument is looked at before is Nix' laziness.
  given = builtins.foldl' (all: module: all // module.args) { } loaded;
  known = args // given // { inherit config lib; };
  config = evaluate [ ] { } tree loaded;
  unknown = firstUnknown [ ] tree loaded;
in
if unknown != null then throw unknown else config
