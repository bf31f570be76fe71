# A machine's configuration, evaluated as strictly as NixOS would, as data:
#
#   nix-instantiate --store dummy:// --eval --strict --json test/nixos/system.nix \
#     --argstr configuration DIR/configuration.nix [--argstr system aarch64-linux]
#
# (The dummy store needs no rights and no Nix installation beside the program.)
#
# It fails where NixOS would: an option or package that does not exist, a value of the wrong
# type, a failed assertion. What stands in the answer is listed below.
{
  configuration,
  # A further module: a file and the attribute of it, such as mistakes.nix and "a password".
  file ? null,
  attribute ? null,
  system ? builtins.replaceStrings [ "darwin" ] [ "linux" ] builtins.currentSystem,
}:

let
  lib = import ./lib.nix;
  inherit (import ./store.nix) storePath;

  programs = import ./packages.nix;
  pkgs = builtins.mapAttrs (attribute: _: {
    type = "derivation";
    name = attribute;
    outPath = storePath attribute "";
  }) programs // {
    # A string, not a package.
    runtimeShell = "${storePath "bash" ""}/bin/bash";
    stdenv.hostPlatform = {
      inherit system;
      isAarch64 = system == "aarch64-linux";
      isx86_64 = system == "x86_64-linux";
    };
  };
  store = lib.mapAttrs' (
    attribute: bin:
    lib.nameValuePair pkgs.${attribute}.outPath {
      package = attribute;
      inherit bin;
    }
  ) programs;

  config = import ./modules.nix {
    inherit lib;
    options = import ./options.nix lib;
  } {
    args = { inherit pkgs; };
    modules = [
      ./nixos.nix
      configuration
    ]
    ++ lib.optional (file != null) further;
  };
  further =
    let
      found = (import file).${attribute};
    in
    found.module or found;

  rendered = import ./files.nix { inherit config lib pkgs; };
  rules = import ./checks.nix {
    inherit config lib store;
    inherit (rendered) files;
  };
  mistakes = builtins.concatMap (rule: rule.mistakes) rules;

  # target -> units, from an option such as wantedBy
  pulledIn =
    option:
    builtins.foldl' (
      all: link: all // { ${link.target} = (all.${link.target} or [ ]) ++ [ link.unit ]; }
    ) { } (
      builtins.concatMap (
        { kind, units }:
        builtins.concatMap (
          name:
          map (target: {
            inherit target;
            unit = "${name}.${kind}";
          }) (units.${name}.${option} or [ ])
        ) (builtins.attrNames units)
      ) kinds
    );
  kinds = [
    {
      kind = "service";
      units = config.systemd.services;
    }
    {
      kind = "timer";
      units = config.systemd.timers;
    }
  ];

  words = text: builtins.filter (word: word != "") (lib.splitString "[[:space:]\\]+" text);
in
# Nix looks at what is asked for; a value of the wrong type counts wherever it stands.
if builtins.deepSeq config mistakes != [ ] then
  throw "\nFailed assertions:\n${lib.concatMapStringsSep "\n" (mistake: "- ${mistake}") mistakes}"
else
  {
    inherit (config.networking) hostName;
    inherit (config.boot) kernelParams kernelModules;
    initrdModules = config.boot.initrd.availableKernelModules;
    inherit (config.system) stateVersion;
    # mount point -> { device, fsType, options }
    inherit (config) fileSystems;

    # path -> { text, mode } or { link }; units, networkd, /etc, and store paths that are text
    inherit (rendered) files;

    # What the links in /etc/systemd/system/TARGET.wants and .requires are made from.
    wants = pulledIn "wantedBy";
    requires = pulledIn "requiredBy";

    # service -> what tests look at; `command` is ExecStart word by word
    units = lib.mapAttrs (name: service: {
      command = words (toString service.serviceConfig.ExecStart);
      execStart = lib.concatStringsSep " " (words (toString service.serviceConfig.ExecStart));
      user = service.serviceConfig.User or "root";
      group = service.serviceConfig.Group or service.serviceConfig.User or "root";
      environment = rendered.environmentOf service;
      restartTriggers = map toString (lib.flatten service.restartTriggers);
      inherit (service) after wantedBy serviceConfig unitConfig;
    }) config.systemd.services;

    users = lib.mapAttrsToList (name: user: {
      inherit name;
      inherit (user) uid group home shell description isSystemUser hashedPassword;
      authorizedKeys = user.openssh.authorizedKeys.keys;
    }) config.users.users;
    groups = lib.mapAttrsToList (name: group: {
      inherit name;
      inherit (group) gid;
    }) config.users.groups;

    systemPackages = lib.unique (map (package: package.name) config.environment.systemPackages);
    # store path -> { package, bin: names of its programs }
    inherit store;

    # For shells and the Nix daemon; certificates to trust beside the usual ones.
    sessionVariables = config.networking.proxy.envVars;
    certificateFiles = map toString config.security.pki.certificateFiles;

    firewall = config.networking.firewall.enable;
    # The rules that were checked and held.
    assertions = map (rule: rule.name) rules;
  }
